//! The real controller against a fake API server and a scripted cluster, in virtual time: what needs many failures, hours, or an
//! operator that dies at a chosen write.

mod happy;


/// Runs a scenario in a world whose time goes by when nobody has anything to do.
fn simulate(scenario: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(scenario());
}
