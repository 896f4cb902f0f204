//! What is asked for, what is recorded, and what is fetched again.

use std::fs;

use harness::{Fault, Hub, Received, Server, Storage};
use serde_json::Value;

use super::Setup;

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
    let again = trainer::store::files::digest_file(&job.path("second/output/adapter_model.safetensors"));
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
