//! One question to one trainer: a connection of its own, gone with the answer, and no more read of it than a trainer has to say.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Bytes;
use crds::report::Progress;
use futures::future::{Either, select};
use http::header::{CONNECTION, HOST};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use k8s_openapi::jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::Asked;

/// For the connection, the head and the body together: a trainer answers from memory.
pub(super) const DEADLINE: Duration = Duration::from_secs(2);
/// The longest answer that is read, its head included.
const MAX_BYTES: usize = 64 * 1024;
/// Metrics, and checkpoints, that are kept of an answer: the status takes fewer.
const KEPT: usize = 64;
/// The longest name or time that is kept.
const KEPT_BYTES: usize = 64;

const NO_CONNECTION: &str = "connection timed out";
const NO_ANSWER: &str = "connected, and no whole answer within 2 s";
const TOO_LONG: &str = "an answer of more than 64 KiB";
const FOREIGN: &str = "not the trainer's answer";

/// What the trainer tells, or why it was not heard: the same words for the same cause, so that they can stand in a status.
pub(super) async fn ask(asked: &Asked) -> Result<Progress, String> {
    let deadline = Instant::now() + DEADLINE;
    let stream = timeout_at(deadline, TcpStream::connect(asked.address)).await.map_err(|_| NO_CONNECTION)?;
    let stream = stream.map_err(|error| of_io(&error))?;
    let body = timeout_at(deadline, exchange(stream, asked.address)).await.map_err(|_| NO_ANSWER)??;
    let progress: Progress = serde_json::from_slice(&body).map_err(|_| FOREIGN)?;
    if progress.job_uid != asked.job_uid || progress.pod_uid != asked.pod_uid {
        return Err("the trainer of another pod".into());
    }
    Ok(bounded(progress))
}

/// The body of the answer, if it is a good one. What is dropped half way is closed: nothing of it runs elsewhere.
async fn exchange(stream: TcpStream, address: SocketAddr) -> Result<Bytes, String> {
    let stream = TokioIo::new(Bounded { stream, left: MAX_BYTES });
    let (mut sender, connection) = http1::handshake(stream).await.map_err(|error| of_http(&error))?;
    let request = http::Request::get("/status")
        .header(HOST, address.to_string())
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("a request of constants and an address");
    let answer = pin!(async {
        let response = sender.send_request(request).await.map_err(|error| of_http(&error))?;
        if !response.status().is_success() {
            return Err(format!("answered {}", response.status().as_u16()));
        }
        Ok(response.into_body().collect().await.map_err(|error| of_http(&error))?.to_bytes())
    });
    match select(answer, pin!(connection)).await {
        Either::Left((answer, _)) => answer,
        // All that came before the end of the connection is there to be taken.
        Either::Right((_, answer)) => answer.await,
    }
}

fn of_http(error: &hyper::Error) -> String {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(found) = cause {
        if let Some(error) = found.downcast_ref::<io::Error>() {
            return of_io(error);
        }
        cause = found.source();
    }
    FOREIGN.into()
}

fn of_io(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::TimedOut => NO_CONNECTION.into(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "no route to the pod".into(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            "connection reset".into()
        }
        io::ErrorKind::FileTooLarge => TOO_LONG.into(),
        // It ended before its head said that it would.
        io::ErrorKind::UnexpectedEof => FOREIGN.into(),
        _ => error.to_string(),
    }
}

/// No more than a few KiB are kept of a pod, whatever it says.
fn bounded(mut progress: Progress) -> Progress {
    progress.metrics.retain(|metric| metric.name.len() <= KEPT_BYTES);
    progress.metrics.truncate(KEPT);
    progress.metrics.shrink_to_fit();
    progress.checkpoints.retain(|checkpoint| checkpoint.time.len() <= KEPT_BYTES);
    let older = progress.checkpoints.len().saturating_sub(KEPT);
    progress.checkpoints.drain(..older);
    progress.checkpoints.shrink_to_fit();
    // By this clock: alerts count from it, and a node's clock may be anywhere.
    progress.last_report_time = Timestamp::now().to_string();
    progress
}

/// A stream of which so much is read and then no more.
struct Bounded {
    stream: TcpStream,
    left: usize,
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut chunk = [0; 4096];
        let most = chunk.len().min(buffer.remaining()).min(self.left);
        if most == 0 {
            return Poll::Ready(Err(io::ErrorKind::FileTooLarge.into()));
        }
        let mut read = ReadBuf::new(&mut chunk[..most]);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut read))?;
        self.left -= read.filled().len();
        buffer.put_slice(read.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
