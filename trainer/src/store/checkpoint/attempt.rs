//! Claims on a run directory: `attempts/000003.json` is the third claim, made by exclusive create, and says which attempt of
//! which pod made it; `attempts/000003.started.json` says which commit it went on from. An attempt may have several pods, one
//! after another: a queue takes its pod away and gives it another. A later claim fences the earlier ones: what they commit
//! after it was made is never read. A lower attempt than one that has claimed is refused.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::manifest::Manifest;
use crate::store::files::{sync_folder, write_atomically};

/// Who claims an attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claim<'a> {
    /// Its number; `None`: the next free one.
    pub number: Option<i32>,
    /// `metadata.uid` of the pod; empty where there is none.
    pub pod_uid: &'a str,
}

/// A claim as it lies in the folder.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Claimed {
    pub attempt: i32,
    job_uid: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pod_uid: String,
    process: u32,
}

impl Claimed {
    /// Who made it.
    pub(super) fn owner(&self) -> String {
        let Self { attempt, pod_uid, process, .. } = self;
        if pod_uid.is_empty() {
            format!("attempt {attempt} (process {process})")
        } else {
            format!("attempt {attempt} (pod {pod_uid})")
        }
    }
}

/// Which commit a claim went on from; sequence 0: from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Start {
    pub claim: i32,
    pub sequence: i64,
}

impl Start {
    /// Whether the commit came from a pod that this one had already overtaken.
    pub(super) fn supersedes(self, manifest: &Manifest) -> bool {
        manifest.claim < self.claim && manifest.sequence > self.sequence
    }
}

/// Claims the folder for the wanted attempt, or for the one after the highest; returns the claim's number and the attempt.
/// `prefix` tells stages apart that count attempts of their own.
pub(super) fn claim(run: &Path, prefix: &str, job_uid: &str, claim: Claim) -> Result<(i32, i32), Error> {
    let folder = run.join("attempts");
    if claim.number.is_some() {
        check_owner(run, job_uid)?;
    }
    loop {
        let claims = claims(run, prefix);
        let highest = claims.iter().filter_map(|(_, claimed)| claimed.as_ref()).max_by_key(|claimed| claimed.attempt);
        let attempt = claim.number.unwrap_or_else(|| highest.map_or(0, |highest| highest.attempt) + 1);
        if let Some(newer) = highest.filter(|highest| highest.attempt > attempt) {
            return Err(Error::Fenced { path: run.into(), own: attempt, newer: newer.owner() });
        }
        let number = claims.last().map_or(0, |(number, _)| *number) + 1;
        let claimed = Claimed {
            attempt,
            job_uid: job_uid.to_owned(),
            pod_uid: claim.pod_uid.to_owned(),
            process: std::process::id(),
        };
        let path = folder.join(format!("{prefix}{number:06}.json"));
        match create_whole(&path, &serde_json::to_vec(&claimed).expect("a claim is JSON")) {
            Ok(()) => return Ok((number, attempt)),
            // Somebody was faster, and may be of a higher attempt.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::write(&path, source)),
        }
    }
}

/// Claims an attempt of a stage that writes no checkpoints: a pod of a lower attempt than one that came leaves.
pub fn claim_stage(run: &Path, stage: &str, job_uid: &str, claim: Claim) -> Result<(), Error> {
    let folder = run.join("attempts");
    fs::create_dir_all(&folder).map_err(|source| Error::write(&folder, source))?;
    self::claim(run, &format!("{stage}-"), job_uid, claim).map(|_| ())
}

/// Takes the folder for this process. The lock goes with the process, however it ends.
pub(super) fn lock(run: &Path) -> Result<File, Error> {
    let path = run.join(".lock");
    let file = File::create(&path).map_err(|source| Error::write(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path: run.into() }),
        Err(TryLockError::Error(source)) => Err(Error::write(&path, source)),
    }
}

/// Makes a file that is not there yet: whoever sees it sees all of it.
fn create_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    let mut file = tempfile::Builder::new().prefix(".tmp-").permissions(mode).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    sync_folder(folder)
}

fn read_claim(path: &Path) -> Option<Claimed> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The claims of a stage, by their numbers; one that is damaged keeps its number.
fn claims(run: &Path, prefix: &str) -> Vec<(i32, Option<Claimed>)> {
    let number = |name: &String| name.strip_prefix(prefix)?.strip_suffix(".json")?.parse().ok();
    let mut claims: Vec<_> = names(run)
        .iter()
        .filter_map(|name| Some((number(name)?, read_claim(&run.join("attempts").join(name)))))
        .collect();
    claims.sort_by_key(|(number, _)| *number);
    claims
}

/// The job that made attempts in a folder, if it is another one.
pub fn run_of_another(folder: &Path, job_uid: &str) -> Option<String> {
    match check_owner(folder, job_uid) {
        Err(Error::ForeignRun { found, .. }) => Some(found),
        _ => None,
    }
}

/// Refuses a folder in which another job made attempts.
fn check_owner(run: &Path, job_uid: &str) -> Result<(), Error> {
    let claim = |name: &String| name.strip_suffix(".json").is_some_and(|stem| !stem.ends_with(".started"));
    let claims = names(run).into_iter().filter(claim);
    for path in claims.map(|name| run.join("attempts").join(name)) {
        if let Some(claimed) = read_claim(&path).filter(|claimed| claimed.job_uid != job_uid) {
            return Err(Error::ForeignRun { path, found: claimed.job_uid, expected: job_uid.to_owned() });
        }
    }
    Ok(())
}

/// Who made the claim after claim `number`, if somebody did.
pub(super) fn overtaken_by(run: &Path, number: i32) -> Option<String> {
    let newest = claims(run, "").pop().filter(|(newest, _)| *newest > number)?;
    Some(newest.1.map_or_else(|| "an attempt whose claim is damaged".to_owned(), |claimed| claimed.owner()))
}

/// Notes which commit a claim goes on from.
pub(super) fn record_start(run: &Path, start: Start) -> Result<(), Error> {
    let path = run.join("attempts").join(format!("{:06}.started.json", start.claim));
    let bytes = serde_json::to_vec(&start).expect("a start is JSON");
    write_atomically(&path, &bytes).map_err(|source| Error::write(&path, source))
}

/// The starts of all claims that came so far.
pub(super) fn starts(run: &Path) -> Vec<Start> {
    let read = |name: &String| {
        name.strip_suffix(".started.json")?;
        serde_json::from_slice(&fs::read(run.join("attempts").join(name)).ok()?).ok()
    };
    names(run).iter().filter_map(read).collect()
}

fn names(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("attempts")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
