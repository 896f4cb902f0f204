//! A cache that others may write: a file in it is believed by its digest, never by its size, its time or its name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crds::run::PodStage::{Prepare, Train};
use harness::{Ended, Hub, Job, Pods, Server};

use super::Setup;

/// Changes one byte in place, and sets the time of the change back, as far as anybody can.
fn exchange(path: &Path) {
    let path = fs::canonicalize(path).expect("there");
    let time = fs::metadata(&path).and_then(|metadata| metadata.modified()).expect("readable");
    let mut bytes = fs::read(&path).expect("readable");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).expect("writable");
    File::options().write(true).open(&path).and_then(|file| file.set_modified(time)).expect("ours");
}

fn snapshot(setup: &Setup) -> PathBuf {
    setup.job.path("cache/models--acme--tiny/snapshots").join(&setup.model)
}

#[test]
fn what_another_job_put_into_the_cache_is_fetched_again() {
    let setup = Setup::new();
    assert_eq!(setup.plan("first", &[]).code, Some(0));
    for (number, name) in ["model.safetensors", "config.json", "tokenizer.json"].into_iter().enumerate() {
        let path = snapshot(&setup).join(name);
        exchange(&path);
        setup.hub.take_received();
        // A run that begins, and one that has begun.
        let runs = [format!("next-{number}"), "first".to_owned()];
        assert_eq!(setup.plan(&runs[number % 2], &[]).code, Some(0), "{name}");
        let genuine = fs::read(setup.job.path("model").join(name)).expect("there");
        assert!(fs::read(&path).expect("fetched again") == genuine, "{name}");
        let received = setup.hub.take_received();
        let asked = received
            .iter()
            .filter(|request| request.path.ends_with(&format!("/{name}")) && request.server == Server::Hub);
        assert!(asked.count() > 0, "{name}: {received:?}");
    }
    // A link of another name for what is genuine changes nothing, and to something else is followed nowhere.
    let path = snapshot(&setup).join("config.json");
    let other = setup.job.path("other.json");
    fs::write(&other, vec![b' '; fs::metadata(&path).expect("there").len() as usize]).expect("writable");
    fs::remove_file(&path).expect("removable");
    std::os::unix::fs::symlink(&other, &path).expect("writable");
    assert_eq!(setup.plan("last", &[]).code, Some(0));
    assert!(fs::read(&path).expect("there") == fs::read(setup.job.path("model/config.json")).expect("there"));
    assert!(other.exists());
}

#[test]
fn without_a_hub_to_ask_a_file_has_to_be_what_its_name_says() {
    let setup = Setup::new();
    let offline: &[(&str, &str)] = &[("HF_HUB_OFFLINE", "1")];
    assert_eq!(setup.plan("first", &[]).code, Some(0));
    assert_eq!(setup.plan("second", offline).code, Some(0));
    exchange(&snapshot(&setup).join("model.safetensors"));
    let outcome = setup.plan("third", offline);
    assert_eq!(outcome.code, Some(66), "{outcome:?}");
    let first = outcome.first_error(setup.job.folder());
    assert!(
        first.contains("model.safetensors: damaged in the cache") && first.contains("unset HF_HUB_OFFLINE"),
        "{first}"
    );
}

/// The training pod has no network: what was prepared has to be what it finds.
#[test]
fn what_is_exchanged_after_it_was_prepared_is_not_trained_on() {
    let job = Job::new();
    job.edit("maxSteps: 60", "maxSteps: 2");
    job.edit("file://model", "hf://acme/tiny");
    let hub = Hub::start();
    let commit = hub.publish("models/acme/tiny", "main", &job.path("model"));
    let pods = Pods::new(job);
    let prepare = |attempt| {
        let mut command = pods.command(Prepare, attempt);
        command.env("HF_ENDPOINT", hub.endpoint());
        let Ended { outcome, .. } = pods.end(command, Prepare, attempt);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    };
    prepare(1);
    let folder = pods.job.path("data/.huggingface/hub/models--acme--tiny/snapshots").join(commit);
    for (attempt, name) in ["model.safetensors", "config.json"].into_iter().enumerate() {
        let genuine = fs::read(folder.join(name)).expect("fetched");
        exchange(&folder.join(name));
        let Ended { outcome, report } = pods.run(Train, attempt as i32 + 1);
        assert_eq!(outcome.code, Some(66), "{name}: {}", outcome.stderr);
        let message = report.failure.expect("refused").message;
        assert!(message.contains("not on the volume as it was prepared"), "{name}: {message}");
        fs::write(folder.join(name), genuine).expect("writable");
    }
    // What is genuine again is read again, and believed.
    pods.succeed(Train, 3);
    exchange(&folder.join("model.safetensors"));
    prepare(2);
    pods.succeed(Train, 4);
}
