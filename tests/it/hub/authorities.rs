//! A hub behind a certificate of an authority that only its owner knows, as `caBundle` of a profile names it to the trainer.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::Setup;

/// Answers 404 to everybody who trusts it, and prints its port first.
const SERVER: &str = "
import http.server, ssl
class NotFound(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()
    do_HEAD = do_GET
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), NotFound)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('hub.pem', 'hub.key')
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
";

/// An authority, and a certificate of its for this machine.
fn make_certificates(folder: &Path) {
    let run = |words: &str| {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(folder).output().expect("openssl runs");
        assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
    };
    std::fs::write(folder.join("extensions"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
        .expect("writable");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    run(&format!("req -x509 {key} -keyout ca.key -out ca.pem -days 1 -subj /CN=authority"));
    run(&format!("req {key} -keyout hub.key -out hub.csr -subj /CN=localhost"));
    run("x509 -req -in hub.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out hub.pem -days 1 -extfile extensions");
}

/// A server that goes with the guard.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_trainer_trusts_the_authorities_that_it_is_given_and_no_stranger() {
    let setup = Setup::new();
    let folder = setup.job.folder();
    make_certificates(folder);
    let mut python = Command::new("python3");
    python.args(["-c", SERVER]).current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut server = Server(python.spawn().expect("python3 runs"));
    let mut port = String::new();
    BufReader::new(server.0.stdout.take().expect("piped")).read_line(&mut port).expect("a port");
    let endpoint = format!("https://localhost:{}", port.trim());
    let code = |certificates: Option<&str>| {
        let mut command = setup.command(&["run", "job.yaml"]);
        command.env("HF_ENDPOINT", &endpoint).env("NO_PROXY", "localhost").env_remove("SSL_CERT_FILE");
        if let Some(file) = certificates {
            command.env(crds::profile::CERTIFICATES, folder.join(file));
        }
        let outcome = setup.outcome(command);
        (outcome.code, outcome.stderr)
    };
    // It was heard: there is no such repository.
    let (found, said) = code(Some("ca.pem"));
    assert_eq!(found, Some(66), "{said}");
    let (found, said) = code(None);
    assert_eq!(found, Some(69), "{said}");
}
