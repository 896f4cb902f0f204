//! `hf://` sources against a server that speaks the hub's protocol: what is asked for, what is recorded, who sees the
//! token, and what people read when it does not work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Fault, Hub, Job, Outcome, Received, Server, Storage};
use serde_json::Value;

/// A hub with a model and a dataset, and a job that names them.
struct Setup {
    hub: Hub,
    job: Job,
    /// Commits of `models/acme/tiny` and `datasets/acme/rows`.
    model: String,
    rows: String,
}

impl Setup {
    fn new() -> Self {
        let job = Job::new();
        job.edit("file://model", "hf://acme/tiny");
        job.edit("file://train.jsonl", "hf://datasets/acme/rows/data/train.jsonl");
        job.edit("file://test.jsonl", "hf://datasets/acme/rows/data/test.jsonl");
        job.edit("maxSteps: 60", "maxSteps: 2");
        // What a trainer must leave where it is: pickles, code, the same weights for other programs.
        for name in ["pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "onnx/model.safetensors"] {
            let path = job.path("model").join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
            fs::write(path, "left where it is").expect("writable");
        }
        fs::create_dir_all(job.path("rows/data")).expect("writable");
        for name in ["train.jsonl", "test.jsonl"] {
            fs::rename(job.path(name), job.path("rows/data").join(name)).expect("writable");
        }
        let hub = Hub::start();
        let model = hub.publish("models/acme/tiny", "main", &job.path("model"));
        let rows = hub.publish("datasets/acme/rows", "main", &job.path("rows"));
        Self { hub, job, model, rows }
    }

    /// The trainer with nothing of this machine's own hub settings.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.job.command(arguments);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_") || name.ends_with("_HUB_CACHE")) {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", self.hub.endpoint()).env("HF_HUB_CACHE", self.job.path("cache"));
        command.env("HF_HOME", self.job.path("home")).env("NO_PROXY", "127.0.0.1");
        command
    }

    /// Runs a command to its end, and looks for tokens in everything that it said or wrote.
    fn outcome(&self, mut command: Command) -> Outcome {
        let output = command.output().expect("the trainer starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let outcome = Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        for secret in [Hub::TOKEN, Hub::TOKEN_WITHOUT_ACCESS, WRONG_TOKEN] {
            assert!(!outcome.stdout.contains(secret) && !outcome.stderr.contains(secret), "{outcome:?}");
            for folder in
                fs::read_dir(self.job.folder()).expect("a folder").map(|entry| entry.expect("readable").path())
            {
                // A test may store a token here; the trainer may not anywhere.
                if !folder.ends_with("login") {
                    assert_eq!(file_with(&folder, secret), None, "a token was written");
                }
            }
        }
        outcome
    }

    /// `plan`, which fetches and prepares as `run` does, into `dir`.
    fn plan(&self, dir: &str, variables: &[(&str, &str)]) -> Outcome {
        let mut command = self.command(&["plan", "job.yaml", "--dir", dir]);
        command.envs(variables.iter().copied());
        self.outcome(command)
    }

    /// Commits of the rows' files as they were prepared in `dir`.
    fn prepared_commits(&self, dir: &str) -> Vec<String> {
        let report = fs::read(self.job.path(dir).join("prepared/data_report.json")).expect("prepared");
        let report: crds::report::DataReport = serde_json::from_slice(&report).expect("JSON");
        report.sources.into_iter().map(|source| source.revision.expect("a commit")).collect()
    }
}

const WRONG_TOKEN: &str = "hf_TokenThatNobodyKnowsAndNobodyMayPrint";

/// A file at or below `path` that holds `text`.
fn file_with(path: &Path, text: &str) -> Option<PathBuf> {
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("readable").map(|entry| entry.expect("readable").path());
        return entries.into_iter().find_map(|entry| file_with(&entry, text));
    }
    let bytes = fs::read(path).ok()?;
    bytes.windows(text.len()).any(|window| window == text.as_bytes()).then(|| path.to_owned())
}

fn of(received: &[Received], server: Server) -> Vec<&Received> {
    received.iter().filter(|request| request.server == server).collect()
}

#[test]
fn a_run_fetches_what_it_reads_at_commits_that_it_records_and_runs_again_without_a_network() {
    let setup = Setup::new();
    let Setup { hub, job, .. } = &setup;
    // The branch that is asked for is not the one that everybody gets.
    fs::write(job.path("model/README.md"), "released").expect("writable");
    let released = hub.publish("models/acme/tiny", "release/1", &job.path("model"));
    assert_ne!(released, setup.model);
    job.edit("uri: hf://acme/tiny", "uri: hf://acme/tiny, revision: release/1");
    let mut command = setup.command(&["run", "job.yaml"]);
    command.env("HF_TOKEN", format!("{}\n", Hub::TOKEN));
    let outcome = setup.outcome(command);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");

    let report = job.report();
    let sources = report.data.expect("a data report").sources;
    let commits: Vec<Option<&str>> = sources.iter().map(|source| source.revision.as_deref()).collect();
    assert_eq!(commits, [Some(setup.rows.as_str()), Some(setup.rows.as_str())]);
    let adapter = fs::read(job.path("runs/tiny/output/adapter_config.json")).expect("an adapter");
    let adapter: Value = serde_json::from_slice(&adapter).expect("JSON");
    let base = ["base_model_name_or_path", "revision"].map(|key| adapter[key].as_str());
    assert_eq!(base, [Some("acme/tiny"), Some(released.as_str())]);

    let received = hub.take_received();
    let mut files: Vec<&str> = of(&received, Server::Hub)
        .into_iter()
        .filter(|request| request.method == "GET")
        .filter_map(|request| request.path.split_once("/resolve/")?.1.split_once('/'))
        .inspect(|(commit, _)| assert!([&released, &setup.rows].contains(&&(*commit).to_owned()), "{commit}"))
        .map(|(_, file)| file)
        .collect();
    files.sort_unstable();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "data/test.jsonl",
        "data/train.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(files, expected);
    let bearer = format!("Bearer {}", Hub::TOKEN);
    assert!(of(&received, Server::Hub).iter().all(|request| request.authorization.as_ref() == Some(&bearer)));
    let storage = of(&received, Server::Storage);
    assert!(!storage.is_empty() && storage.iter().all(|request| request.authorization.is_none()), "{storage:?}");

    let digest = job.adapter_digest();
    let mut command = setup.command(&["run", "job.yaml", "--dir", "second"]);
    command.env("HF_HUB_OFFLINE", "1");
    let outcome = setup.outcome(command);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(hub.take_received(), []);
    let again = trainer::checkpoint::digest_file(&job.path("second/output/adapter_model.safetensors"));
    assert_eq!(again.expect("an adapter"), digest);
}

#[test]
fn a_branch_that_moved_is_followed_and_only_what_changed_is_fetched() {
    let setup = Setup::new();
    assert_eq!(setup.plan("first", &[]).code, Some(0));
    assert_eq!(setup.prepared_commits("first"), [setup.rows.as_str(); 2]);
    setup.job.write_rows("rows/data/train.jsonl", 0..30);
    let moved = setup.hub.publish("datasets/acme/rows", "main", &setup.job.path("rows"));
    setup.hub.take_received();
    assert_eq!(setup.plan("second", &[]).code, Some(0));
    assert_eq!(setup.prepared_commits("second"), [moved.as_str(); 2]);
    let received = setup.hub.take_received();
    let content = received.iter().filter(|request| request.method == "GET" && request.path.contains("/resolve-cache/"));
    let content: Vec<&str> = content.map(|request| request.path.as_str()).collect();
    assert_eq!(content, [format!("/api/resolve-cache/datasets/acme/rows/{moved}/data/train.jsonl")]);
    assert_eq!(of(&received, Server::Storage), Vec::<&Received>::new());

    assert_eq!(setup.plan("third", &[("HF_HUB_OFFLINE", "true")]).code, Some(0));
    assert_eq!(setup.prepared_commits("third"), [moved.as_str(); 2]);
    assert_eq!(setup.hub.take_received(), []);
}

#[test]
fn large_files_come_through_xet_which_never_sees_the_token() {
    let setup = Setup::new();
    setup.hub.set_storage(Storage::Xet);
    let outcome = setup.plan("runs/tiny", &[("HF_TOKEN", Hub::TOKEN)]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let received = setup.hub.take_received();
    let storage = of(&received, Server::Storage);
    assert!(storage.iter().any(|request| request.path.starts_with("/chunks/")), "{storage:?}");
    for request in storage {
        let authorization = request.authorization.as_deref();
        assert!([None, Some("Bearer xet-access")].contains(&authorization), "{request:?}");
    }
    let fetched = setup.job.path("cache/models--acme--tiny/snapshots").join(&setup.model).join("model.safetensors");
    assert_eq!(
        fs::read(fetched).expect("fetched"),
        fs::read(setup.job.path("model/model.safetensors")).expect("there")
    );
}

#[test]
fn tokens_come_from_where_the_python_library_looks_for_them() {
    let cases: [(&str, &[(&str, &str)], Option<&str>); 5] = [
        ("nothing", &[], None),
        ("empty", &[("HF_TOKEN", "")], None),
        ("stored by login", &[("HF_HOME", "login")], Some(Hub::TOKEN)),
        ("a file", &[("HF_TOKEN_PATH", "login/token")], Some(Hub::TOKEN)),
        ("switched off", &[("HF_TOKEN", Hub::TOKEN), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
    ];
    let setup = Setup::new();
    fs::create_dir(setup.job.path("login")).expect("writable");
    setup.job.write("login/token", format!("{}\n", Hub::TOKEN));
    for (name, variables, expected) in cases {
        // A run that has begun asks for nothing again.
        let outcome = setup.plan(name, variables);
        assert_eq!(outcome.code, Some(0), "{name}: {outcome:?}");
        let expected = expected.map(|token| format!("Bearer {token}"));
        let received = setup.hub.take_received();
        assert!(
            !received.is_empty() && received.iter().all(|r| r.server == Server::Storage || r.authorization == expected),
            "{name}: {received:?}"
        );
    }
}

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
    let small = "chat_template.jinja arrived damaged and was thrown away; try again";
    let cases = [
        (Storage::Redirect, Fault::CutContent, "the connection broke off; try again, files that are complete are kept"),
        (Storage::Redirect, Fault::ContentStatus(403), damaged),
        (Storage::Redirect, Fault::ContentStatus(503), damaged),
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
fn a_cache_that_was_damaged_is_mended() {
    let setup = Setup::new();
    assert_eq!(setup.plan("runs/tiny", &[]).code, Some(0));
    let rows = setup.job.path("cache/datasets--acme--rows/snapshots").join(&setup.rows).join("data/train.jsonl");
    let whole = fs::read(&rows).expect("fetched");
    for dir in ["second", "runs/tiny"] {
        fs::write(&rows, &whole[..whole.len() / 2]).expect("writable");
        assert_eq!(setup.plan(dir, &[]).code, Some(0));
        assert_eq!(fs::read(&rows).expect("fetched again"), whole, "{dir}");
    }
}

#[test]
fn a_run_that_has_begun_keeps_its_commits_and_needs_no_hub() {
    let setup = Setup::new();
    assert_eq!(setup.plan("runs/tiny", &[]).code, Some(0));
    setup.hub.take_received();
    setup.hub.set_fault(Fault::Status(500));
    let outcome = setup.plan("runs/tiny", &[]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(setup.hub.take_received().is_empty(), "nothing is asked");
    assert_eq!(setup.plan("runs/other", &[]).code, Some(69), "a new run asks");
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
        "spec.model.uri: hf://acme/tiny: the hub has been silent for 2 s; try again, or set HF_HUB_DOWNLOAD_TIMEOUT to \
         more seconds",
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
        ("acme/tiny", "../tiny", format!("spec.model.uri: found hf://../tiny, {repository}")),
        ("acme/tiny", "acme/tiny?x=1", format!("spec.model.uri: found hf://acme/tiny?x=1, {repository}")),
        (
            "acme/tiny",
            "acme/tiny/config.json",
            "spec.model.uri: found hf://acme/tiny/config.json, expected hf://owner/name, pvc://claim/path or file://path".to_owned(),
        ),
        (
            "rows/data/train.jsonl",
            "rows/../../../train.jsonl",
            format!("spec.dataset.train.uri: found hf://datasets/acme/rows/../../../train.jsonl, {repository}"),
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
