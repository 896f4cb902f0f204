//! What a run directory holds of a job, for whoever only wants to know: nothing is digested, nothing is written, and a volume
//! that is mounted read-only will do.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use super::manifest::{MANIFEST, read_manifest};
use super::{Error, attempt, folders};

/// A checkpoint that was committed: its folder was renamed into place with a whole manifest, and its files have their sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Completed steps.
    pub step: i64,
    /// When its manifest was written; of a clock that the volume has.
    pub time: Option<SystemTime>,
    /// Whether it is the best of those that are there.
    pub best: bool,
}

/// The job's committed checkpoints, newest last, without those of attempts that had been overtaken. None where there is no
/// folder of checkpoints yet.
pub fn committed(run: &Path, job_uid: &str) -> Result<Vec<Committed>, Error> {
    if !run.join("checkpoints").exists() {
        return Ok(Vec::new());
    }
    let starts = attempt::starts(run);
    let mut found = Vec::new();
    for folder in folders(run)? {
        let Ok((manifest, _)) = read_manifest(&folder) else { continue };
        let has_size = |name: &str, bytes| fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == bytes);
        let is_whole = manifest.files.iter().all(|file| has_size(&file.name, file.bytes));
        if manifest.job_uid != job_uid || !is_whole || starts.iter().any(|start| start.supersedes(&manifest)) {
            continue;
        }
        let time = fs::metadata(folder.join(MANIFEST)).and_then(|file| file.modified()).ok();
        found.push((manifest.sequence, Committed { step: manifest.step, time, best: manifest.best }));
    }
    found.sort_by_key(|(sequence, _)| *sequence);
    let mut committed: Vec<Committed> = found.into_iter().map(|(_, committed)| committed).collect();
    // Each was the best when it was written: the newest of them still is.
    let mut better_came = false;
    for checkpoint in committed.iter_mut().rev() {
        checkpoint.best &= !better_came;
        better_came |= checkpoint.best;
    }
    Ok(committed)
}
