//! A hub that is down, overloaded or cut off for a while: what passes by itself is waited for, by whoever can wait.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use harness::{Fault, Hub, Outcome, Server, Storage, signal, wait_for};

use super::Setup;

/// `plan` with so many seconds of patience, until it has told the line; what it tells from then on goes nowhere.
fn waiting(mut command: Command, patience: &str, line: &str) -> Child {
    let mut child = command.env("FINETUNE_HUB_PATIENCE", patience).spawn().expect("the trainer starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
    let told: Vec<String> = lines.by_ref().take_while(|told| !told.contains(line)).collect();
    let mut rest = lines;
    assert!(child.try_wait().expect("a child of ours").is_none(), "it ended without waiting: {told:?}");
    std::thread::spawn(move || rest.by_ref().count());
    child
}

fn code(mut child: Child) -> Option<i32> {
    child.wait().expect("a child of ours").code()
}

#[test]
fn a_hub_that_refuses_connections_is_waited_for() {
    let setup = Setup::new();
    let nobody = Hub::nobody();
    let mut command = setup.command(&["plan", "job.yaml"]);
    command.env("HF_ENDPOINT", &nobody);
    let child = waiting(command, "60", "the hub cannot be reached; trying again in");
    let hub = Hub::start_at(&nobody);
    hub.publish("models/acme/tiny", "main", &setup.job.path("model"));
    hub.publish("datasets/acme/rows", "main", &setup.job.path("rows"));
    assert_eq!(code(child), Some(0));
    assert_eq!(setup.prepared_commits("runs/tiny"), [setup.rows.as_str(); 2]);
}

#[test]
fn a_hub_that_is_not_well_is_asked_again_and_not_sooner_than_it_says() {
    for (fault, line, pause) in [
        (Fault::Status(500), "the hub answered with status 500", Duration::from_millis(750)),
        (Fault::RetryAfter(503, 2), "the hub answered with status 503", Duration::from_secs(2)),
        (Fault::RetryAfter(429, 2), "the hub limits the rate of requests", Duration::from_secs(2)),
        (Fault::Status(200), "the answer is not a hub's", Duration::from_millis(750)),
    ] {
        let setup = Setup::new();
        setup.hub.set_fault(fault);
        let child = waiting(setup.command(&["plan", "job.yaml"]), "60", line);
        setup.hub.set_fault(Fault::None);
        assert_eq!(code(child), Some(0), "{fault:?}");
        let received = setup.hub.take_received();
        let waited = received[1].at - received[0].at;
        assert!(waited >= pause && waited < Duration::from_secs(30), "{fault:?}: {waited:?}");
    }
}

#[test]
fn patience_ends_and_a_wait_that_is_longer_is_not_begun() {
    let setup = Setup::new();
    setup.hub.set_fault(Fault::Status(503));
    let started = Instant::now();
    let outcome = setup.plan("runs/tiny", &[("FINETUNE_HUB_PATIENCE", "3")]);
    assert_eq!(outcome.code, Some(69), "{outcome:?}");
    assert!(started.elapsed() >= Duration::from_secs(3), "{outcome:?}");
    assert!(outcome.stderr.contains("for 3 s at most; Ctrl-C stops"), "{outcome:?}");
    assert!(setup.hub.take_received().len() > 2);

    setup.hub.set_fault(Fault::RetryAfter(503, 3600));
    let outcome = setup.plan("runs/tiny", &[("FINETUNE_HUB_PATIENCE", "60")]);
    assert_eq!(outcome.code, Some(69), "{outcome:?}");
    assert_eq!(setup.hub.take_received().len(), 1);

    // What no time mends is told at once.
    setup.hub.set_fault(Fault::Status(403));
    let outcome = setup.plan("runs/tiny", &[("FINETUNE_HUB_PATIENCE", "60")]);
    assert_eq!(outcome.code, Some(77), "{outcome:?}");
    assert_eq!(setup.hub.take_received().len(), 1);
}

#[test]
fn who_waits_can_be_stopped_at_once() {
    let setup = Setup::new();
    for (fault, told) in [(Fault::Status(503), "trying again in"), (Fault::Silence, "")] {
        setup.hub.set_fault(fault);
        setup.hub.take_received();
        let mut command = setup.command(&["run", "job.yaml"]);
        let mut child = if told.is_empty() {
            let mut child = command.spawn().expect("the trainer starts");
            assert!(wait_for(&mut child, || setup.hub.requests() > 0));
            child
        } else {
            waiting(command, "600", told)
        };
        let asked = Instant::now();
        signal(&child, "INT");
        assert_eq!(child.wait().expect("a child of ours").code(), Some(75), "{fault:?}");
        assert!(asked.elapsed() < Duration::from_secs(5), "{fault:?}: {:?}", asked.elapsed());
        let failure = setup.job.report().failure.expect("it says why");
        assert!(failure.message.contains("stopped while sources were fetched"), "{failure:?}");
    }
}

#[test]
fn a_download_that_is_cut_goes_on_from_where_it_was() {
    let weights = |setup: &Setup| fs::read(setup.job.path("model/model.safetensors")).expect("there");
    // Where the requests for the weights begin: the second one after what the first one brought.
    let starts = |setup: &Setup| -> Vec<usize> {
        let received = setup.hub.take_received();
        let ranges = received.iter().filter(|request| request.server == Server::Storage).map(|request| &request.range);
        let start = |range: &String| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok();
        ranges.map(|range| range.as_ref().map_or(0, |range| start(range).expect("a range"))).collect()
    };
    for storage in [Storage::Redirect, Storage::RedirectWhole] {
        let setup = Setup::new();
        setup.hub.set_storage(storage);
        setup.hub.set_fault(Fault::CutContentOnce);
        let outcome = setup.plan("runs/tiny", &[("FINETUNE_HUB_PATIENCE", "60")]);
        assert_eq!(outcome.code, Some(0), "{storage:?}: {outcome:?}");
        assert!(outcome.stderr.contains("the connection broke off; trying again in"), "{outcome:?}");
        let starts = starts(&setup);
        assert!(starts.len() == 2 && starts[0] == 0 && starts[1] > 0, "{storage:?}: {starts:?}");
        check_weights(&setup, &weights(&setup));
    }
    // In another process, too: the pod that began is gone.
    let setup = Setup::new();
    setup.hub.set_fault(Fault::CutContent);
    assert_eq!(setup.plan("runs/tiny", &[]).code, Some(69));
    setup.hub.set_fault(Fault::None);
    starts(&setup);
    assert_eq!(setup.plan("runs/tiny", &[]).code, Some(0));
    let starts = starts(&setup);
    assert!(starts.len() == 1 && starts[0] > 0, "{starts:?}");
    check_weights(&setup, &weights(&setup));
}

fn check_weights(setup: &Setup, expected: &[u8]) {
    let fetched = setup.job.path("cache/models--acme--tiny/snapshots").join(&setup.model).join("model.safetensors");
    assert!(fs::read(fetched).expect("fetched") == expected);
    let blobs = fs::read_dir(setup.job.path("cache/models--acme--tiny/blobs")).expect("there").flatten();
    let left: Vec<_> =
        blobs.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains(".part")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Who reads a job's status has no variable to set, and no command to run again.
#[test]
fn a_job_in_a_cluster_is_told_what_its_reader_can_do() {
    let setup = Setup::new();
    let told = |setup: &Setup| -> Outcome { setup.plan("runs/tiny", &[("POD_UID", "pod-1")]) };
    for (fault, words) in [
        (
            Fault::Status(503),
            "the hub answered with status 503; it was waited for, and the operator tries again by itself",
        ),
        (Fault::Status(200), "its administrator names it in the profile (hub.endpoint)"),
        (Fault::CutContent, "what has arrived is kept"),
    ] {
        setup.hub.set_fault(fault);
        let outcome = told(&setup);
        assert_eq!(outcome.code, Some(69), "{outcome:?}");
        let first = outcome.first_error(setup.job.folder());
        assert!(first.contains(words) && !first.contains("HF_"), "{first}");
    }
    setup.hub.set_fault(Fault::None);
    setup.hub.gate("models/acme/tiny");
    let outcome = told(&setup);
    let first = outcome.first_error(setup.job.folder());
    assert!(
        outcome.code == Some(77) && first.contains("put the files on a claim") && !first.contains("HF_"),
        "{first}"
    );
}
