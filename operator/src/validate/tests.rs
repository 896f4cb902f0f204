//! Plans of earlier versions. `plan-0.1.0.yaml` and `run-0.1.0.yaml` were written by version 0.1.0 for a job and a profile that
//! set every field there was.

use super::*;

/// A job that trains while the operator is upgraded keeps its plan, and the status keeps its digest: what is written again is
/// what was read.
#[test]
fn the_plan_of_an_earlier_version_is_read_and_written_as_it_was() {
    let (run, plan) = (include_str!("run-0.1.0.yaml"), include_str!("plan-0.1.0.yaml"));
    let read = Plan::read(run, plan).expect("an earlier plan is read");
    assert_eq!(read.run, RunConfig::from_yaml(run).expect("an earlier configuration is read"));
    assert_eq!(read.files(), (run.to_owned(), plan.to_owned()));
    // Also where this version would not write it so.
    let other = plan.replacen("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds:  60", 1);
    assert_ne!(other, plan);
    let read = Plan::read(run, &other).expect("the same plan");
    assert_eq!(read.files(), (run.to_owned(), other.clone()));
    assert_eq!(read.digest(), digest_of_files(run, &other));
}
