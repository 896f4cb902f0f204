//! A job that nothing happens to.

use harness::apiserver::{Life, Simulation};
use serde_json::json;

use super::simulate;

#[test]
fn a_job_goes_its_way_with_these_writes_and_no_others() {
    simulate(async || {
        let simulation = Simulation::start(Life::of);
        simulation.submit("bot", &json!({"output": {"uri": "pvc://published/bot"}}));
        let end = simulation.end("bot", 600).await;
        assert_eq!(end, ("Complete".into(), "Completed".into()), "{}", simulation.account());
        println!("{:#?}", simulation.writes());
        println!("{:#}", simulation.job("bot"));
    });
}
