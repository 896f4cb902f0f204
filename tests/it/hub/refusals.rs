//! What people read when it does not work.

use std::fs;

use harness::{Fault, Hub, Outcome, Storage};

use super::{Setup, WRONG_TOKEN};

/// Compares exit code and first error line.
fn check(name: &str, setup: &Setup, outcome: &Outcome, code: i32, expected: &str) {
    let first = outcome.first_error(setup.job.folder()).replace(&setup.hub.endpoint(), "ENDPOINT");
    assert!(
        outcome.code == Some(code) && first == expected,
        "{name}:\n  found    {:?} {first}\n  expected {code} {expected}\n{}",
        outcome.code,
        outcome.stderr
    );
}

/// Runs a job after `spoil`, and compares exit code and first error line.
fn refused(name: &str, spoil: impl Fn(&Setup), variables: &[(&str, &str)], code: i32, expected: &str) -> Setup {
    let setup = Setup::new();
    spoil(&setup);
    let mut command = setup.command(&["run", "job.yaml"]);
    command.envs(variables.iter().copied());
    let outcome = setup.outcome(command);
    check(name, &setup, &outcome, code, expected);
    setup
}

#[test]
fn what_is_not_there() {
    let no_repository = "no such repository, or a private one that needs HF_TOKEN; check owner and name";
    refused(
        "repository, to a stranger",
        |setup| setup.job.edit("acme/tiny", "acme/tinny"),
        &[],
        66,
        &format!("spec.model.uri: hf://acme/tinny: {no_repository}"),
    );
    refused(
        "repository, to an account",
        |setup| setup.job.edit("acme/tiny", "acme/tinny"),
        &[("HF_TOKEN", Hub::TOKEN)],
        66,
        "spec.model.uri: hf://acme/tinny: no such repository, or a private one that the token does not open; check owner and name",
    );
    refused(
        "dataset",
        |setup| setup.job.edit("acme/rows/data/test", "acme/row/data/test"),
        &[],
        66,
        &format!("spec.dataset.validation.uri: hf://datasets/acme/row/data/test.jsonl: {no_repository}"),
    );
    for revision in ["v9", "0123456789012345678901234567890123456789"] {
        refused(
            "revision",
            |setup| setup.job.edit("acme/tiny", &format!("acme/tiny, revision: \"{revision}\"")),
            &[],
            66,
            &format!(
                "spec.model.uri: hf://acme/tiny: no revision {revision}; expected a branch, tag or commit of the repository"
            ),
        );
    }
    refused(
        "file",
        |setup| setup.job.edit("data/train", "data/trian"),
        &[],
        66,
        "spec.dataset.train.uri: hf://datasets/acme/rows/data/trian.jsonl: no file data/trian.jsonl in the repository; \
         beside it are data/test.jsonl, data/train.jsonl",
    );
    refused(
        "folder",
        |setup| setup.job.edit("data/train", "date/train"),
        &[],
        66,
        "spec.dataset.train.uri: hf://datasets/acme/rows/date/train.jsonl: no such file or folder in the repository",
    );
    let setup = refused(
        "safetensors",
        |setup| {
            fs::remove_file(setup.job.path("model/model.safetensors")).expect("removable");
            setup.hub.publish("models/acme/tiny", "main", &setup.job.path("model"));
        },
        &[],
        66,
        "spec.model.uri: hf://acme/tiny: no model*.safetensors in the repository, only pytorch_model.bin; only \
         safetensors weights are read",
    );
    let received = setup.hub.take_received();
    assert!(received.iter().all(|request| !request.path.contains("/resolve/")), "{received:?}");
}

#[test]
fn offline_without_a_cache() {
    let offline: &[(&str, &str)] = &[("HF_HUB_OFFLINE", "1")];
    let reason = "not in the local cache, and HF_HUB_OFFLINE forbids fetching it; unset it, or fetch it once";
    let setup = refused("nothing", |_| (), offline, 66, &format!("spec.model.uri: hf://acme/tiny: {reason}"));
    assert_eq!(setup.hub.take_received(), []);
    assert_eq!(setup.plan("runs/tiny", &[]).code, Some(0));
    setup.job.edit("data/test", "data/other");
    let outcome = setup.plan("runs/tiny", offline);
    let expected = format!("spec.dataset.validation.uri: hf://datasets/acme/rows/data/other.jsonl: {reason}");
    check("a file", &setup, &outcome, 66, &expected);

    // A commit needs no branch in the cache; what was fetched of it before the connection broke off is not a model.
    let setup = Setup::new();
    setup.job.edit("acme/tiny", &format!("acme/tiny, revision: \"{}\"", setup.model));
    setup.hub.set_fault(Fault::CutContent);
    assert_eq!(setup.plan("runs/tiny", &[]).code, Some(69));
    let outcome = setup.plan("runs/tiny", offline);
    check("a part", &setup, &outcome, 66, &format!("spec.model.uri: hf://acme/tiny: {reason}"));
}

#[test]
fn gates_and_tokens() {
    let gate = |setup: &Setup| setup.hub.gate("models/acme/tiny");
    refused(
        "gated, to a stranger",
        gate,
        &[],
        77,
        "spec.model.uri: hf://acme/tiny: gated, and there is no token; accept the licence at ENDPOINT/acme/tiny and set \
         HF_TOKEN to a token of that account",
    );
    refused(
        "gated, to an account without access",
        gate,
        &[("HF_TOKEN", Hub::TOKEN_WITHOUT_ACCESS)],
        77,
        "spec.model.uri: hf://acme/tiny: gated, and the account of the token has no access; accept the licence at \
         ENDPOINT/acme/tiny, or set HF_TOKEN to a token of an account that did",
    );
    refused(
        "gated rows",
        |setup| setup.hub.gate("datasets/acme/rows"),
        &[],
        77,
        "spec.dataset.train.uri: hf://datasets/acme/rows/data/train.jsonl: gated, and there is no token; accept the \
         licence at ENDPOINT/datasets/acme/rows and set HF_TOKEN to a token of that account",
    );
    refused(
        "a token that nobody knows",
        |_| (),
        &[("HF_TOKEN", WRONG_TOKEN)],
        77,
        "spec.model.uri: hf://acme/tiny: the hub does not accept the token; set HF_TOKEN to a valid one",
    );
    let setup = Setup::new();
    gate(&setup);
    let outcome = setup.plan("runs/tiny", &[("HF_TOKEN", Hub::TOKEN)]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

#[test]
fn a_hub_that_is_not_well() {
    let fault = |fault: Fault| move |setup: &Setup| setup.hub.set_fault(fault);
    let nobody = Hub::nobody();
    refused(
        "down",
        |_| (),
        &[("HF_ENDPOINT", &nobody)],
        69,
        "spec.model.uri: hf://acme/tiny: the hub cannot be reached; check the network and HF_ENDPOINT, or set \
         HF_HUB_OFFLINE=1 to use the cache",
    );
    for status in [500, 503] {
        let expected =
            format!("spec.model.uri: hf://acme/tiny: the hub answered with status {status}; try again later");
        refused("status", fault(Fault::Status(status)), &[], 69, &expected);
    }
    refused(
        "rate limit",
        fault(Fault::Status(429)),
        &[],
        69,
        "spec.model.uri: hf://acme/tiny: the hub limits the rate of requests; try again later",
    );
    refused(
        "silence",
        fault(Fault::Silence),
        &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")],
        69,
        "spec.model.uri: hf://acme/tiny: the hub has been silent for 1 s; try again, or set HF_HUB_DOWNLOAD_TIMEOUT to \
         more seconds",
    );
    refused(
        "another server",
        fault(Fault::Status(200)),
        &[],
        69,
        "spec.model.uri: hf://acme/tiny: the answer is not a hub's; check HF_ENDPOINT",
    );
}

#[test]
fn content_that_did_not_arrive_whole_is_not_kept() {
    let damaged = "model.safetensors arrived damaged and was thrown away; try again";
    let storage = |status| format!("the storage that the hub sends to answered with status {status}; try again later");
    let (forbidden, overloaded) = (storage(403), storage(503));
    let small = "the hub lists chat_template.jinja and does not have it; try again later";
    let cases = [
        (Storage::Redirect, Fault::CutContent, "the connection broke off; try again, what has arrived is kept"),
        (Storage::Redirect, Fault::ContentStatus(403), &forbidden),
        (Storage::Redirect, Fault::ContentStatus(503), &overloaded),
        (Storage::Redirect, Fault::SmallContentStatus(404), small),
        (Storage::Redirect, Fault::FlippedContent, damaged),
        (Storage::Xet, Fault::FlippedContent, damaged),
    ];
    for (storage, fault, reason) in cases {
        let spoil = |setup: &Setup| {
            setup.hub.set_storage(storage);
            setup.hub.set_fault(fault);
        };
        let expected = format!("spec.model.uri: hf://acme/tiny: {reason}");
        let setup = refused(&format!("{storage:?} {fault:?}"), spoil, &[], 69, &expected);
        setup.hub.set_fault(Fault::None);
        setup.hub.take_received();
        let outcome = setup.plan("runs/tiny", &[]);
        assert_eq!(outcome.code, Some(0), "{fault:?}: {outcome:?}");
        let received = setup.hub.take_received();
        let again = received.iter().any(|request| request.path.ends_with("/config.json"));
        // The listing names it before the weights.
        assert_eq!(again, reason == small, "what was complete is fetched once: {received:?}");
    }
}

#[test]
fn xet_that_is_not_well_does_not_take_minutes() {
    let spoil = |setup: &Setup| {
        setup.hub.set_storage(Storage::Xet);
        setup.hub.set_fault(Fault::ContentStatus(500));
    };
    let started = std::time::Instant::now();
    refused(
        "storage",
        spoil,
        &[("HF_HUB_DOWNLOAD_TIMEOUT", "2")],
        69,
        "spec.model.uri: hf://acme/tiny: the storage that the hub sends to answered with status 500; try again later",
    );
    // Xet's own retries would go on for more than a minute.
    assert!(started.elapsed().as_secs() < 30, "{:?}", started.elapsed());
}

#[test]
fn addresses_that_are_none() {
    let repository =
        "expected hf://owner/name (datasets: hf://datasets/owner/name/file), pvc://claim/path or file://path";
    let cases = [
        ("acme/tiny", "acme", format!("spec.model.uri: found hf://acme, {repository}")),
        (
            "acme/tiny",
            "../tiny",
            "job.yaml:5:16: spec.model.uri: found hf://../tiny, expected a path without the parts . and ..".to_owned(),
        ),
        ("acme/tiny", "acme/tiny?x=1", format!("spec.model.uri: found hf://acme/tiny?x=1, {repository}")),
        (
            "acme/tiny",
            "acme/tiny/config.json",
            "spec.model.uri: found hf://acme/tiny/config.json, expected hf://owner/name, pvc://claim/path or file://path".to_owned(),
        ),
        (
            "rows/data/train.jsonl",
            "rows/../../../train.jsonl",
            "job.yaml:6:26: spec.dataset.train.uri: found hf://datasets/acme/rows/../../../train.jsonl, expected a path without \
             the parts . and .."
                .to_owned(),
        ),
        (
            "acme/tiny",
            "acme/tiny, revision: ../../main",
            "spec.model.revision: found ../../main, expected a branch, tag or commit".to_owned(),
        ),
    ];
    for (from, to, expected) in cases {
        let setup = refused(to, |setup| setup.job.edit(from, to), &[], 64, &expected);
        let received = setup.hub.take_received();
        assert!(received.iter().all(|request| !request.path.contains("datasets")), "{received:?}");
    }
    for endpoint in ["localhost:8080", "ftp://127.0.0.1", "http://user:password@127.0.0.1"] {
        let expected = "spec.model.uri: hf://acme/tiny: HF_ENDPOINT is not usable; expected http(s)://host without \
                        user and password";
        refused(endpoint, |_| (), &[("HF_ENDPOINT", endpoint)], 64, expected);
    }
}
