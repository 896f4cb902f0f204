//! The real API server and nothing else, for what it alone decides: schemas, admission, what helm asks it. It needs neither
//! root nor a cluster, so that the tests on it run everywhere.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::repository;

/// A running API server; it ends with this, or with the process.
#[derive(Debug)]
pub struct KubeApiServer {
    folder: PathBuf,
    holder: Child,
}

impl KubeApiServer {
    /// Starts one, within seconds.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder").keep();
        let mut holder = Command::new(repository().join("tests/cluster/api-server"))
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the script starts");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().expect("it is piped")).read_line(&mut line).expect("readable");
        assert_eq!(line, "ready\n", "the API server did not start; its logs are in {}", folder.display());
        Self { folder, holder }
    }

    /// As a member of `system:masters`.
    fn client(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("KUBECONFIG", self.folder.join("kubeconfig"));
        command
    }

    /// A kubeconfig for another user, who has the rights that roles give him.
    pub fn kubeconfig_of(&self, user: &str) -> PathBuf {
        let own = std::fs::read_to_string(self.folder.join("kubeconfig")).expect("it was written");
        let (before, after) = own.split_once("user: {").expect("the administrator's token");
        let path = self.folder.join(format!("kubeconfig-{user}"));
        std::fs::write(&path, format!("{before}user: {{as: \"{user}\", {after}")).expect("the folder is writable");
        path
    }

    /// What such a program prints, or all that it says when it fails.
    pub fn ask(&self, program: &Path, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut child = self
            .client(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
        let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
        let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        if status.success() { Ok(stdout) } else { Err(stdout + &stderr) }
    }
}

impl Drop for KubeApiServer {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        self.holder.wait().expect("it is a child");
    }
}
