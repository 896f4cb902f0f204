//! Attempts on a run directory: `attempts/000003.json` claims a number by exclusive create, `attempts/000003.started.json`
//! says which commit the attempt went on from. A higher attempt fences a lower one: what the lower one commits after the
//! higher one has begun is never read.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::files::{sync_folder, write_atomically};
use super::manifest::Manifest;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Claim {
    attempt: i32,
    job_uid: String,
    process: u32,
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

/// Claims `number`, or the next free one.
pub(super) fn claim(run: &Path, job_uid: &str, number: Option<i32>) -> Result<i32, Error> {
    let folder = run.join("attempts");
    let mut attempt = number.unwrap_or_else(|| highest(run) + 1);
    loop {
        let path = folder.join(format!("{attempt:06}.json"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => {
                let claim = Claim { attempt, job_uid: job_uid.to_owned(), process: std::process::id() };
                let bytes = serde_json::to_vec(&claim).expect("a claim is JSON");
                file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(|source| Error::write(&path, source))?;
                break;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number.is_none() => attempt += 1,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::AttemptTaken { path: run.into(), number: attempt });
            }
            Err(source) => return Err(Error::write(&path, source)),
        }
    }
    sync_folder(&folder).map_err(|source| Error::write(&folder, source))?;
    Ok(attempt)
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
