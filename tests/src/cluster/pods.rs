//! Pods that tests make, and the images of the product that pods run.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{outcome, run};

/// A pod that runs one container under Pod Security *restricted*; `more` are further lines of the container, in YAML flow style.
pub fn restricted_pod(name: &str, image: &str, command: &[&str], more: &str) -> String {
    let command = serde_json::to_string(command).expect("strings encode");
    format!(
        r#"apiVersion: v1
kind: Pod
metadata: {{name: "{name}", labels: {{app: "{name}"}}}}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  securityContext: {{runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
    - name: main
      image: "{image}"
      command: {command}
      securityContext: {{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {{drop: [ALL]}}}}
{more}
"#
    )
}

/// Writes the archive of an image of the product into `folder`; returns it and its digest.
pub fn build_image(name: &str, folder: &Path) -> (PathBuf, String) {
    let binary = crate::trainer_binary();
    let target = binary.parent().and_then(Path::parent).expect("binaries lie in target/release");
    let script = crate::repository().join("images/build.sh");
    let built = run(Command::new(script).arg(folder).arg(name).env("CARGO_TARGET_DIR", target));
    let line = outcome(built).unwrap_or_else(|error| panic!("images/build.sh {name}: {error}"));
    let (archive, digest) = line.trim().split_once('\t').unwrap_or_else(|| panic!("images/build.sh wrote {line}"));
    (archive.into(), digest.to_owned())
}
