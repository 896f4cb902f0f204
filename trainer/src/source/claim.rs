//! `pvc://claim/path`: a place below the folder where the claim is mounted. What is there is used in place. Nothing that
//! leads out of the claim is followed: neither `..` nor a link.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::hub::is_read;
use super::{Error, MODEL_TEXTS, is_plain};

/// Folder where each claim is mounted.
pub type Claims = BTreeMap<String, String>;

const EXPECTED: &str = "pvc://claim/path, without . and .. in it";

/// A place in a claim: its folder, resolved, and the path below it.
pub struct Place {
    /// The claim's folder.
    pub root: PathBuf,
    /// What was asked for; it need not exist.
    pub path: PathBuf,
}

/// The place that a `pvc://` URI names; `None` for another scheme.
pub fn place(field: &'static str, uri: &str, claims: &Claims) -> Result<Option<Place>, Error> {
    let Some(rest) = uri.strip_prefix("pvc://") else { return Ok(None) };
    let refuse = |expected| Error::Uri { field, uri: uri.into(), expected };
    let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.strip_suffix('/').unwrap_or(path);
    if !path.is_empty() && !is_plain(path) {
        return Err(refuse(EXPECTED));
    }
    let folder = claims.get(claim).ok_or_else(|| refuse("a claim that storage.claims has a folder for"))?;
    let root = fs::canonicalize(folder).map_err(|source| unreadable(field, uri, &source))?;
    let path = root.join(path);
    Ok(Some(Place { root, path }))
}

/// Where `place` leads, links resolved.
pub fn resolve(field: &'static str, uri: &str, place: &Place) -> Result<PathBuf, Error> {
    let path = fs::canonicalize(&place.path).map_err(|source| unreadable(field, uri, &source))?;
    if path.starts_with(&place.root) { Ok(path) } else { Err(Error::LeavesClaim { field, uri: uri.into() }) }
}

/// Refuses links that lead out of the claim among the files that are read of a model's folder.
pub fn check_links(field: &'static str, uri: &str, place: &Place, folder: &Path) -> Result<(), Error> {
    let entries = fs::read_dir(folder).map_err(|source| unreadable(field, uri, &source))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let read = names.filter(|name| is_read(name)).chain(MODEL_TEXTS.map(str::to_owned));
    for name in read {
        // A link to nothing is as good as no file, and is told as one where the file is needed.
        if fs::canonicalize(folder.join(&name)).is_ok_and(|target| !target.starts_with(&place.root)) {
            return Err(Error::LeavesClaim { field, uri: format!("{uri}/{name}") });
        }
    }
    Ok(())
}

fn unreadable(field: &'static str, uri: &str, source: &io::Error) -> Error {
    Error::Claim { field, uri: uri.into(), message: source.to_string() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_leads_out_of_a_claim() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let inside = folder.path().join("claim");
        fs::create_dir_all(inside.join("a/b")).expect("writable");
        fs::write(folder.path().join("secret"), "x").expect("writable");
        symlink("a/b", inside.join("good")).expect("writable");
        symlink("../secret", inside.join("bad")).expect("writable");
        symlink(folder.path(), inside.join("worse")).expect("writable");
        symlink("../../../secret", inside.join("a/b/config.json")).expect("writable");
        let claims = Claims::from([("rows".to_owned(), inside.display().to_string())]);
        let check = |uri: &str| -> Result<PathBuf, Error> {
            let place = place("spec.model.uri", uri, &claims)?.expect("a pvc:// URI");
            let path = resolve("spec.model.uri", uri, &place)?;
            check_links("spec.model.uri", uri, &place, &path).map(|()| path)
        };
        let root = fs::canonicalize(&inside).expect("there");
        assert_eq!(check("pvc://rows/a/").expect("inside"), root.join("a"));
        assert_eq!(check("pvc://rows").expect("no model file leads out"), root);
        for (uri, code, words) in [
            ("pvc://rows/../secret", 64, "without . and .."),
            ("pvc://rows//etc/passwd", 64, "without . and .."),
            ("pvc://rows/a/./b", 64, "without . and .."),
            ("pvc://other/a", 64, "storage.claims"),
            ("pvc:///etc", 64, "storage.claims"),
            ("pvc://rows/none", 66, "pvc://rows/none"),
            ("pvc://rows/bad", 77, "leads out of the claim"),
            ("pvc://rows/worse/secret", 77, "leads out of the claim"),
            ("pvc://rows/good", 77, "pvc://rows/good/config.json"),
        ] {
            let error = check(uri).expect_err(uri);
            assert!(error.exit().code() == code && error.to_string().contains(words), "{uri}: {error}");
        }
        assert!(place("spec.model.uri", "file:///etc", &claims).expect("not ours").is_none());
    }
}
