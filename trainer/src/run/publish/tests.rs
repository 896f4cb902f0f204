use super::*;

fn job(name: &str, uid: &str) -> JobIdentity {
    JobIdentity { name: name.into(), namespace: Some("team".into()), uid: uid.into(), attempt: None }
}

struct Volume {
    folder: tempfile::TempDir,
    claims: Claims,
}

impl Volume {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir_all(folder.path().join("claim")).expect("writable");
        let claims = [("models".to_owned(), folder.path().join("claim").display().to_string())].into();
        Self { folder, claims }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("claim").join(name)
    }

    /// Publishes a file that says `content`.
    fn publish(&self, uri: &str, job: &JobIdentity, content: &str) -> Result<(), Error> {
        let output = self.folder.path().join("output");
        fs::create_dir_all(output.join("templates")).expect("writable");
        fs::write(output.join("adapter_model.safetensors"), content).expect("writable");
        fs::write(output.join("templates/tool_use.jinja"), content).expect("writable");
        Destination::open(uri, job, &self.claims)?.fill(&output, &Stop::default())
    }

    fn published(&self, name: &str) -> String {
        fs::read_to_string(self.path(name).join("adapter_model.safetensors")).expect("published")
    }
}

#[test]
fn an_output_replaces_what_the_same_job_left_and_nothing_else() {
    let volume = Volume::new();
    let uri = "pvc://models/team/bot";
    volume.publish(uri, &job("bot", "1"), "first").expect("a new folder");
    assert_eq!(fs::read_to_string(volume.path("team/bot/templates/tool_use.jinja")).expect("there"), "first");
    volume.publish(uri, &job("bot", "1"), "second").expect("the same job");
    assert_eq!(volume.published("team/bot"), "second");
    volume.publish(uri, &job("bot", "2"), "third").expect("the job made again");
    assert_eq!(volume.published("team/bot"), "third");
    let error = volume.publish(uri, &job("other", "3"), "fourth").expect_err("another job's");
    assert!(error.exit().code() == 73 && error.to_string().contains("the output of job bot (2)"), "{error}");
    assert_eq!(volume.published("team/bot"), "third");
    let names: Vec<_> = fs::read_dir(volume.path("team")).expect("there").flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let mode = fs::metadata(volume.path("team/bot")).expect("there").permissions().mode();
    assert_eq!(mode & 0o555, 0o555, "whoever serves it is another user");
}

#[test]
fn what_nobody_marked_stays() {
    let volume = Volume::new();
    fs::create_dir_all(volume.path("empty")).expect("writable");
    fs::create_dir_all(volume.path("full")).expect("writable");
    fs::write(volume.path("full/notes"), "x").expect("writable");
    fs::write(volume.path("file"), "x").expect("writable");
    std::os::unix::fs::symlink(volume.folder.path(), volume.path("out")).expect("writable");
    let job = job("bot", "1");
    volume.publish("pvc://models/empty", &job, "x").expect("nothing was there");
    for (uri, code, words) in [
        ("pvc://models/full", 73, "a folder with files is there already"),
        ("pvc://models/file", 73, "a file is there already"),
        ("pvc://models/file/below", 73, "cannot be written"),
        ("pvc://models/out/x", 77, "leads out of the claim"),
        ("pvc://models/out", 77, "leads out of the claim"),
        ("pvc://models", 64, "of a folder"),
        ("pvc://models/../x", 64, "without . and .."),
        ("pvc://others/x", 64, "storage.claims"),
        ("s3://bucket/x", 64, "of a folder"),
    ] {
        let error = volume.publish(uri, &job, "x").expect_err(uri);
        assert!(error.exit().code() == code && error.to_string().contains(words), "{uri}: {error}");
    }
    assert_eq!(fs::read_to_string(volume.path("full/notes")).expect("there"), "x");
}

/// A job that could write there could give another one its own base model.
#[test]
fn nothing_is_published_into_the_run_of_another_job() {
    let volume = Volume::new();
    let (ours, theirs) = (job("bot", "1"), job("other", "2"));
    for run in ["runs/bot", "runs/other"] {
        fs::create_dir_all(volume.path(run)).expect("writable");
    }
    let claim = |run: &str, job: &JobIdentity| {
        let claim = crate::store::checkpoint::Claim { number: Some(1), pod_uid: "" };
        crate::store::checkpoint::claim_stage(&volume.path(run), "prepare", &job.uid, claim).expect("a new folder");
    };
    claim("runs/bot", &ours);
    claim("runs/other", &theirs);
    for uri in ["pvc://models/runs/other", "pvc://models/runs/other/new", "pvc://models/runs/other/a/b/c"] {
        let error = volume.publish(uri, &ours, "x").expect_err(uri);
        assert!(error.exit().code() == 73 && error.to_string().contains("run of another job (2)"), "{uri}: {error}");
    }
    volume.publish("pvc://models/runs/bot/out", &ours, "x").expect("its own run");
    volume.publish("pvc://models/runs/third", &ours, "x").expect("beside them");
}

#[test]
fn what_jobs_trust_is_no_destination() {
    let volume = Volume::new();
    fs::create_dir_all(volume.path("runs/a/attempts")).expect("writable");
    fs::create_dir_all(volume.path("cache/models--a--b/blobs")).expect("writable");
    fs::create_dir_all(volume.path("cache/models--a--b/snapshots")).expect("writable");
    std::os::unix::fs::symlink("cache/models--a--b", volume.path("alias")).expect("writable");
    let job = job("bot", "1");
    for (path, words) in [
        (".huggingface/hub/models--a--b/snapshots/c0", "the cache of the model hub"),
        ("cache/models--a--b/snapshots/c0", "the cache of the model hub"),
        ("alias/blobs/x", "the cache of the model hub"),
        ("runs/a/checkpoints/step-0000001-c001", "the files of a run (checkpoints)"),
        ("runs/a/checkpoints-before-claim-000001", "the files of a run"),
        ("runs/a/output", "the files of a run (output)"),
        ("runs/a/reports/x", "the files of a run (reports)"),
    ] {
        let error = volume.publish(&format!("pvc://models/{path}"), &job, "x").expect_err(path);
        assert!(error.exit().code() == 64 && error.to_string().contains(words), "{path}: {error}");
        assert!(!volume.path(path).join("adapter_model.safetensors").exists(), "{path}");
    }
    // Beside them there is room: a run whose directory is the whole claim publishes there too.
    fs::create_dir_all(volume.path("attempts")).expect("writable");
    for path in ["runs/a/final", "team/bot", "cache/bot"] {
        volume.publish(&format!("pvc://models/{path}"), &job, "x").unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

#[test]
fn a_copy_that_is_stopped_replaces_nothing() {
    let volume = Volume::new();
    let job = job("bot", "1");
    volume.publish("pvc://models/bot", &job, "first").expect("a new folder");
    let stop = Stop::default();
    stop.request();
    let destination = Destination::open("pvc://models/bot", &job, &volume.claims).expect("ours");
    assert_eq!(destination.fill(&volume.folder.path().join("output"), &stop).expect_err("stopped").exit().code(), 75);
    assert_eq!(volume.published("bot"), "first");
    assert_eq!(fs::read_dir(volume.path("")).expect("there").count(), 1);
}
