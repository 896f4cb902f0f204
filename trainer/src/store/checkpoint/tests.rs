//! A checkpoint exists or it does not: damage, overtaken attempts, other inputs, full disks.

use super::*;

fn identity() -> Identity {
    let text = |text: &str| text.to_owned();
    Identity { job_uid: text("job"), config: text("config"), dataset: text("data"), base_model: text("base") }
}

fn claim(number: Option<i32>) -> Claim<'static> {
    Claim { number, pod_uid: "pod-1" }
}

fn open(run: &Path, attempt: Option<i32>) -> Store {
    Store::open(run, identity(), EquivalenceClass::default(), claim(attempt)).expect("opens")
}

fn open_as(run: &Path, attempt: i32, pod_uid: &str) -> Store {
    let claim = Claim { number: Some(attempt), pod_uid };
    Store::open(run, identity(), EquivalenceClass::default(), claim).expect("opens")
}

fn commit(store: &mut Store, step: i64, best: bool) -> Stored {
    let body = format!("weights of step {step}");
    let write = |sink: &mut dyn Write| sink.write_all(body.as_bytes());
    store.commit(step, best, &[Content { name: "a.safetensors", write: &write }]).expect("commits")
}

#[test]
fn a_commit_of_an_overtaken_attempt_is_never_read() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut first = open(run.path(), Some(1));
    commit(&mut first, 10, false);
    // The lower attempt looks at the fence before the higher one claims it, and renames afterwards.
    let late = run.path().join("late");
    fs::rename(commit(&mut first, 20, true).folder, &late).expect("movable");
    let mut second = open(run.path(), Some(2));
    assert_eq!(second.latest().expect("readable").0.expect("a checkpoint").manifest.step, 10);
    fs::rename(&late, run.path().join("checkpoints/step-0000020-c001")).expect("movable");
    assert_eq!(second.find(20).expect("readable"), None);
    let (found, warnings) = open(run.path(), Some(3)).latest().expect("readable");
    assert_eq!(found.expect("a checkpoint").manifest.step, 10);
    assert!(warnings[0].contains("had been overtaken"), "{warnings:?}");
}

#[test]
fn beginning_anew_keeps_what_is_there_and_never_reads_it() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let old = commit(&mut open(run.path(), Some(1)), 10, true);
    let mut store = open(run.path(), Some(2));
    let aside = store.set_aside().expect("movable").expect("there was one");
    assert!(aside.join(old.folder.file_name().expect("a name")).exists());
    assert_eq!(store.find(10).expect("readable"), None);
    commit(&mut store, 10, false);
    store.retain(1, 1).expect("removable");
    let stored = store.find(10).expect("readable").expect("just committed");
    assert_eq!((stored.manifest.attempt, stored.manifest.sequence), (2, 2));
}

#[test]
fn a_folder_is_for_one_process_where_nobody_counts_attempts() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let first = open(run.path(), None);
    let error = Store::open(run.path(), identity(), EquivalenceClass::default(), claim(None)).expect_err("in use");
    assert!(error.to_string().contains("another run is in progress") && error.exit().code() == 73, "{error}");
    drop(first);
    assert_eq!(open(run.path(), None).attempt(), 2);
}

fn latest_step(run: &Path) -> (Option<i64>, usize) {
    let (stored, warnings) = open(run, None).latest().expect("readable");
    (stored.map(|stored| stored.manifest.step), warnings.len())
}

#[test]
fn the_newest_that_verifies_wins_whatever_is_damaged() {
    for name in ["a.safetensors", MANIFEST] {
        let length = {
            let run = tempfile::tempdir().expect("a temporary folder");
            fs::metadata(commit(&mut open(run.path(), None), 10, false).folder.join(name)).expect("there").len()
        };
        for offset in (0..length as usize).step_by(7) {
            for truncate in [true, false] {
                let run = tempfile::tempdir().expect("a temporary folder");
                let mut store = open(run.path(), Some(1));
                commit(&mut store, 10, false);
                let damaged = commit(&mut store, 20, false).folder.join(name);
                let mut bytes = fs::read(&damaged).expect("readable");
                if truncate {
                    bytes.truncate(offset);
                } else {
                    bytes[offset] ^= 0x10;
                }
                fs::write(&damaged, bytes).expect("writable");
                let (step, warnings) = latest_step(run.path());
                assert_eq!((step, warnings), (Some(10), 1), "{name} at {offset}, truncated: {truncate}");
            }
        }
    }
}

#[test]
fn a_folder_without_its_manifest_never_was() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut store = open(run.path(), Some(1));
    commit(&mut store, 10, false);
    let stored = commit(&mut store, 20, false);
    fs::remove_file(stored.folder.join(MANIFEST)).expect("removable");
    assert_eq!(latest_step(run.path()), (Some(10), 1));
}

#[test]
fn other_inputs_are_refused_by_name() {
    let run = tempfile::tempdir().expect("a temporary folder");
    commit(&mut open(run.path(), None), 10, false);
    let changes: [(&str, fn(&mut Identity)); 4] = [
        ("another job", |identity| identity.job_uid.push('x')),
        ("another configuration", |identity| identity.config.push('x')),
        ("another dataset", |identity| identity.dataset.push('x')),
        ("another base model", |identity| identity.base_model.push('x')),
    ];
    for (what, change) in changes {
        let mut other = identity();
        change(&mut other);
        let mut store = Store::open(run.path(), other, EquivalenceClass::default(), claim(None)).expect("opens");
        let error = store.latest().expect_err("foreign");
        assert!(error.to_string().contains(what) && error.exit().code() == 78, "{error}");
    }
}

#[test]
fn what_was_overtaken_never_commits_again() {
    // By a higher attempt, and by a later pod of the same.
    for later in [2, 1] {
        let run = tempfile::tempdir().expect("a temporary folder");
        let mut first = open(run.path(), Some(1));
        commit(&mut first, 10, false);
        let mut second = open_as(run.path(), later, "pod-2");
        assert_eq!(second.attempt(), later);
        assert!(second.latest().expect("readable").0.is_some());
        let write = |sink: &mut dyn Write| sink.write_all(b"late");
        let error = first.commit(20, false, &[Content { name: "a", write: &write }]).expect_err("fenced");
        let expected = format!("attempt 1 was overtaken by attempt {later} (pod pod-2)");
        assert!(error.to_string().contains(&expected) && error.exit().code() == 75, "{error}");
        // The same step is committed anew, beside what the first pod made of it.
        commit(&mut second, 10, false);
        commit(&mut second, 20, false);
        let mut third = open_as(run.path(), later, "pod-3");
        let (stored, warnings) = third.latest().expect("readable");
        assert_eq!((stored.expect("a checkpoint").manifest.step, warnings.len()), (20, 0));
    }
}

#[test]
fn a_lower_attempt_is_refused() {
    let run = tempfile::tempdir().expect("a temporary folder");
    drop(open(run.path(), Some(2)));
    let error = Store::open(run.path(), identity(), EquivalenceClass::default(), claim(Some(1))).expect_err("late");
    let expected = "attempt 1 was overtaken by attempt 2 (pod pod-1)";
    assert!(error.to_string().contains(expected) && error.exit().code() == 75, "{error}");
    // A claim that the disk lost half of keeps its place.
    fs::write(run.path().join("attempts/000002.json"), "{\"attempt\"").expect("writable");
    drop(open(run.path(), Some(2)));
    assert!(run.path().join("attempts/000003.json").exists());
}

#[test]
fn stages_count_their_own_attempts_and_a_folder_is_of_one_job() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let prepare = |uid: &str, number| claim_stage(run.path(), "prepare", uid, claim(Some(number)));
    prepare("job", 1).expect("the first");
    prepare("job", 1).expect("its next pod");
    prepare("job", 2).expect("the next");
    assert!(matches!(prepare("job", 1), Err(Error::Fenced { own: 1, .. })));
    assert_eq!(open(run.path(), Some(1)).attempt(), 1);
    let error = prepare("another", 3).expect_err("foreign");
    assert!(error.exit().code() == 78 && error.to_string().contains("belongs to job job"), "{error}");
}

#[test]
fn the_judged_checkpoint_is_found_by_its_digest_or_refused() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut store = open(run.path(), Some(1));
    let (first, second) = (commit(&mut store, 10, true), commit(&mut store, 20, false));
    let find = |uid: &str, digest: &str| find_by_digest(run.path(), uid, digest);
    assert_eq!(find("job", &first.digest).expect("there"), first);
    assert!(matches!(find("another", &first.digest), Err(Error::Missing { .. })));
    assert!(matches!(find("job", "sha256:0"), Err(Error::Missing { .. })));
    fs::write(second.folder.join("a.safetensors"), "other").expect("writable");
    let error = find("job", &second.digest).expect_err("damaged");
    assert!(error.to_string().contains("a.safetensors is damaged"), "{error}");
}

#[test]
fn a_failed_write_leaves_older_checkpoints_and_no_rest() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut store = open(run.path(), Some(1));
    commit(&mut store, 10, false);
    let write = |sink: &mut dyn Write| {
        sink.write_all(b"half")?;
        Err(io::Error::from(io::ErrorKind::StorageFull))
    };
    let error = store.commit(20, false, &[Content { name: "a", write: &write }]).expect_err("full");
    assert!(error.exit().code() == 73 && error.to_string().contains("after 4 bytes"), "{error}");
    let names: Vec<_> =
        fs::read_dir(run.path().join("checkpoints")).expect("there").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(latest_step(run.path()), (Some(10), 0));
}

#[test]
fn the_newest_and_the_best_stay() {
    let all = [(1, true), (2, false), (3, true), (4, false), (5, false)];
    assert_eq!(retained(&all, 2, 1), BTreeSet::from([3, 4, 5]));
    assert_eq!(retained(&all, 0, 0), BTreeSet::from([3, 5]));
    assert_eq!(retained(&all, 9, 9).len(), 5);
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut store = open(run.path(), Some(1));
    for (step, best) in [(1, true), (2, false), (3, false)] {
        commit(&mut store, step, best);
    }
    store.retain(1, 1).expect("removable");
    let mut steps: Vec<i64> = store.own().expect("readable").iter().map(|(_, manifest)| manifest.step).collect();
    steps.sort_unstable();
    assert_eq!(steps, [1, 3]);
}

#[test]
fn what_is_committed_is_told_without_reading_it() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let told = |uid: &str| -> Vec<(i64, bool)> {
        let found = committed(run.path(), uid).expect("readable");
        assert!(found.iter().all(|checkpoint| checkpoint.time.is_some()));
        found.iter().map(|checkpoint| (checkpoint.step, checkpoint.best)).collect()
    };
    assert_eq!(told("job"), []);
    let mut first = open(run.path(), Some(1));
    commit(&mut first, 10, true);
    commit(&mut first, 20, true);
    let last = commit(&mut first, 30, false);
    assert_eq!(told("job"), [(10, false), (20, true), (30, false)]);
    assert_eq!(told("another"), []);
    // Same size, other bytes: only whoever loads it looks at them.
    let file = last.folder.join("a.safetensors");
    let bytes = fs::read(&file).expect("readable");
    fs::write(&file, vec![0; bytes.len()]).expect("writable");
    assert_eq!(told("job").len(), 3);
    fs::write(&file, &bytes[1..]).expect("writable");
    assert_eq!(told("job"), [(10, false), (20, true)], "it is not whole");
    fs::write(&file, &bytes).expect("writable");
    fs::write(last.folder.join("manifest.json"), "{").expect("writable");
    fs::create_dir(run.path().join("checkpoints/.tmp-step-0000040-c001-x")).expect("writable");
    assert_eq!(told("job"), [(10, false), (20, true)]);
    // A pod that had been overtaken wrote it.
    let late = commit(&mut first, 40, true);
    let aside = run.path().join("late");
    fs::rename(&late.folder, &aside).expect("movable");
    open(run.path(), Some(2)).latest().expect("readable");
    fs::rename(&aside, &late.folder).expect("movable");
    assert_eq!(told("job"), [(10, false), (20, true)]);
}
