//! Attempts on a run directory: `attempts/000003.json` claims a number by exclusive create, `attempts/000003.started.json`
//! says which commit the attempt went on from. A higher attempt fences a lower one: what the lower one commits after the
//! higher one has begun is never read.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::{sync_folder, write_atomically};
use super::manifest::Manifest;
use super::{Claim, Error};

/// A claim as it lies in the folder.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Claimed {
    attempt: i32,
    job_uid: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pod_uid: String,
    process: u32,
}

impl Claimed {
    fn owner(&self) -> String {
        if self.pod_uid.is_empty() { format!("process {}", self.process) } else { format!("pod {}", self.pod_uid) }
    }
}

/// Which commit an attempt went on from; sequence 0: from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Start {
    pub attempt: i32,
    pub sequence: i64,
}

impl Start {
    /// Whether the commit came from an attempt that this one had already overtaken.
    pub(super) fn supersedes(self, manifest: &Manifest) -> bool {
        manifest.attempt < self.attempt && manifest.sequence > self.sequence
    }
}

/// Claims the wanted number, or the next free one. `prefix` tells stages apart that count attempts of their own.
pub(super) fn claim(run: &Path, prefix: &str, job_uid: &str, claim: Claim) -> Result<i32, Error> {
    let folder = run.join("attempts");
    if claim.number.is_some() {
        check_owner(run, job_uid)?;
    }
    let mut attempt = claim.number.unwrap_or_else(|| highest(run) + 1);
    loop {
        let path = folder.join(format!("{prefix}{attempt:06}.json"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => {
                let claimed = Claimed {
                    attempt,
                    job_uid: job_uid.to_owned(),
                    pod_uid: claim.pod_uid.to_owned(),
                    process: std::process::id(),
                };
                let bytes = serde_json::to_vec(&claimed).expect("a claim is JSON");
                file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(|source| Error::write(&path, source))?;
                break;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && claim.number.is_none() => attempt += 1,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let owner = read_claim(&path).map_or_else(|| "somebody".to_owned(), |claimed| claimed.owner());
                return Err(Error::AttemptTaken { path: run.into(), number: attempt, owner });
            }
            Err(source) => return Err(Error::write(&path, source)),
        }
    }
    sync_folder(&folder).map_err(|source| Error::write(&folder, source))?;
    Ok(attempt)
}

fn read_claim(path: &Path) -> Option<Claimed> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Refuses a folder in which another job made attempts.
fn check_owner(run: &Path, job_uid: &str) -> Result<(), Error> {
    let claims = names(run).into_iter().filter(|name| !name.ends_with(".started.json"));
    for path in claims.map(|name| run.join("attempts").join(name)) {
        if let Some(claimed) = read_claim(&path).filter(|claimed| claimed.job_uid != job_uid) {
            return Err(Error::ForeignRun { path, found: claimed.job_uid, expected: job_uid.to_owned() });
        }
    }
    Ok(())
}

/// The highest attempt that was claimed; 0 if none.
pub(super) fn highest(run: &Path) -> i32 {
    let names = names(run);
    names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).max().unwrap_or(0)
}

/// Notes which commit an attempt goes on from.
pub(super) fn record_start(run: &Path, start: Start) -> Result<(), Error> {
    let path = run.join("attempts").join(format!("{:06}.started.json", start.attempt));
    let bytes = serde_json::to_vec(&start).expect("a start is JSON");
    write_atomically(&path, &bytes).map_err(|source| Error::write(&path, source))
}

/// The starts of all attempts that came so far.
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
