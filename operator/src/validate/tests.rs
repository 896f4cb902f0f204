//! Plans of earlier versions. `plan-0.1.0.yaml` and `run-0.1.0.yaml` were written by version 0.1.0 for a job and a profile that
//! set every field there was.

use super::*;

/// A job that trains while the operator is upgraded keeps its plan, and the status keeps its digest: what is written again is
/// what was read.
#[test]
fn the_plan_of_an_earlier_version_is_read_and_written_as_it_was() {
    let (run, plan) = (include_str!("run-0.1.0.yaml"), include_str!("plan-0.1.0.yaml"));
    let read: Plan = serde_saphyr::from_str(plan).expect("an earlier plan is read");
    assert_eq!(read.run, RunConfig::from_yaml(run).expect("an earlier configuration is read"));
    let (run_again, plan_again) = read.files();
    assert_eq!(run_again, run);
    assert_eq!(plan_again, plan);
}
