//! The job's control file: what a running job is told. It may be absent, appear later, and be swapped at any time.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crds::run::Control;

use crate::ground::stop::Stop;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Looks at `path` now, and from now on in a thread of its own, until a stop is asked for.
pub fn follow(path: PathBuf, stop: Stop) -> io::Result<()> {
    let mut told = None;
    look(&path, &stop, &mut told);
    std::thread::Builder::new().name("control".into()).spawn(move || {
        while !stop.finish_requested() {
            std::thread::sleep(INTERVAL);
            look(&path, &stop, &mut told);
        }
    })?;
    Ok(())
}

/// `told` is the complaint that was made last: each is made once.
fn look(path: &Path, stop: &Stop, told: &mut Option<String>) {
    let complaint = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(format!("cannot be read ({error})")),
        Ok(text) => match Control::from_yaml(&text) {
            Ok(control) => {
                if control.stop_requested {
                    stop.request_finish();
                }
                None
            }
            Err(error) => Some(error.to_string()),
        },
    };
    if let Some(complaint) = complaint.as_ref().filter(|complaint| told.as_ref() != Some(*complaint)) {
        // Nobody may be left to read it.
        let _ = writeln!(io::stderr(), "warning: {}: {complaint}; it is ignored until it changes", path.display());
    }
    *told = complaint;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_told_once_and_changes_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (path, stop, mut told) = (folder.path().join("control.yaml"), Stop::default(), None);
        look(&path, &stop, &mut told);
        assert_eq!(told, None);
        for content in ["stopRequested: [", "stopRequested: maybe", "\u{0}", "- 1"] {
            fs::write(&path, content).expect("writable");
            look(&path, &stop, &mut told);
            assert!(told.is_some() && !stop.finish_requested(), "{content:?}");
        }
        fs::write(&path, "stopRequested: true\nsurprise: 1\n").expect("writable");
        look(&path, &stop, &mut told);
        assert!(told.is_none() && stop.finish_requested() && !stop.requested());
    }
}
