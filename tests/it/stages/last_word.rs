//! The report stage: what an attempt said last, or, where it said nothing, what the volume holds.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crds::report::Stage;
use crds::run::PodStage::{self, Prepare, Publish, Train};
use harness::{Ended, Job, Pods, wait_for};

use super::short;

#[test]
fn a_last_word_that_nobody_read_is_handed_on() {
    let pods = Pods::new(short());
    assert_eq!(pods.hand_on(Prepare, 1).outcome.code, Some(66));
    pods.succeed(Prepare, 1);
    let trained = pods.succeed(Train, 1);
    let Ended { outcome, report } = pods.hand_on(Train, 1);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(report, trained);
    for (of, attempt, words) in
        [(Prepare, 2, "is of attempt 1, not of attempt 2"), (Publish, 1, "no report of the publish stage")]
    {
        let Ended { outcome, report } = pods.hand_on(of, attempt);
        assert_eq!(outcome.code, Some(66), "{}", outcome.stderr);
        let failure = report.failure.expect("refused");
        assert!(failure.exit_code == 66 && failure.message.contains(words), "{failure:?}");
        assert_eq!(report.pod_stage, Some(PodStage::Report), "nobody takes it for the other's");
    }
    pods.write_config(|config| config.job.uid = "another".into());
    assert_eq!(pods.hand_on(Prepare, 1).outcome.code, Some(78));
    assert_eq!(pods.hand_on(Train, 1).outcome.code, Some(78));
}

/// Files and folders with their times, to see that nothing was written.
fn listing(folder: &Path, found: &mut Vec<(PathBuf, SystemTime)>) {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable").path());
    for path in entries.chain([folder.to_owned()]) {
        found.push((path.clone(), fs::metadata(&path).and_then(|file| file.modified()).expect("readable")));
        if path.is_dir() && path != folder {
            listing(&path, found);
        }
    }
}

/// The node died, say: what the attempt had reached is told by the volume, and that it ended well by nobody.
#[test]
fn of_an_attempt_that_left_no_word_the_volume_tells_how_far_it_came() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 400");
    let pods = Pods::new(job);
    pods.succeed(Prepare, 1);
    let told = |attempt: i32| {
        let mut before = Vec::new();
        listing(&pods.job.path("data"), &mut before);
        let Ended { outcome, report } = pods.hand_on(Train, attempt);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let mut after = Vec::new();
        listing(&pods.job.path("data"), &mut after);
        assert_eq!(after, before, "it only looks");
        assert!(report.is_of(Pods::UID, Train, attempt) && report.from_volume, "{report:?}");
        assert_eq!(report.stage, Stage::Failed);
        assert_eq!(report.failure.as_ref().map(|failure| failure.reason.as_str()), Some("ReportMissing"));
        report
    };
    let nothing = told(1);
    assert_eq!((nothing.last_checkpoint_step, nothing.step, nothing.checkpoints.len()), (None, 0, 0));
    let mut child = pods.start(Train, 1);
    assert!(wait_for(&mut child, || pods.logged_steps() > 20));
    child.kill().expect("a child of ours");
    child.wait().expect("a child of ours");
    let known = told(1);
    let step = known.last_checkpoint_step.expect("one was committed");
    assert!(step >= 4 && step % 4 == 0, "{known:?}");
    assert_eq!(known.checkpoints.last().map(|checkpoint| checkpoint.step), Some(step));
    assert!(known.failure.as_ref().is_some_and(|failure| failure.message.contains(&format!("of step {step}"))));
    assert!(known.config_digest.starts_with("sha256:"), "{known:?}");
    // What another attempt says is not this one's, and neither is what was cut off.
    fs::create_dir_all(pods.job.path("data/reports")).expect("writable");
    fs::write(pods.job.path("data/reports/train.json"), "{\"jobUid\": \"0b8e").expect("writable");
    let cut_off = told(1);
    assert_eq!((cut_off.last_checkpoint_step, &cut_off.checkpoints), (Some(step), &known.checkpoints));
    assert!(cut_off.failure.is_some_and(|failure| failure.message.contains("it is damaged")));
    assert_eq!(told(2).last_checkpoint_step, Some(step));
}
