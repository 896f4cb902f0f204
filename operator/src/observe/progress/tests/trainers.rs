//! Servers that answer as trainers do, and as nobody should.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What a server does with a connection.
#[derive(Clone, Debug)]
pub(super) enum Trainer {
    /// An answer of this status and body; it leaves it to the other side to close.
    Says { status: &'static str, body: String },
    /// These bytes, and the end.
    Raw(&'static str),
    /// Nothing, for ever.
    NeverAnswers,
    /// A byte now and then of a long body.
    Drips,
    /// A body without end.
    Endless,
    /// A head without end.
    EndlessHead,
    /// Nobody listens.
    Refuses,
}

/// Servers, gone with this.
#[derive(Debug)]
pub(super) struct Trainers {
    servers: JoinSet<()>,
    open: Arc<AtomicUsize>,
    most_open: Arc<AtomicUsize>,
    /// By server, how often each was asked.
    asked: watch::Sender<Vec<usize>>,
}

impl Default for Trainers {
    fn default() -> Self {
        let asked = watch::Sender::new(Vec::new());
        Self { servers: JoinSet::new(), open: Arc::default(), most_open: Arc::default(), asked }
    }
}

impl Trainers {
    /// Starts a server on a port of its own.
    pub(super) async fn start(&mut self, trainer: Trainer) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        if matches!(trainer, Trainer::Refuses) {
            return address;
        }
        let (open, most_open, asked) = (Arc::clone(&self.open), Arc::clone(&self.most_open), self.asked.clone());
        let number = self.asked.borrow().len();
        self.asked.send_modify(|asked| asked.push(0));
        self.servers.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                most_open.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                asked.send_modify(|asked| asked[number] += 1);
                let (open, trainer) = (Arc::clone(&open), trainer.clone());
                connections.spawn(async move {
                    // Whatever goes wrong here is the other side closing.
                    let _ = serve(stream, trainer).await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        address
    }

    /// Returns when `is_enough` of how often each server was asked.
    pub(super) async fn until(&self, is_enough: impl Fn(&[usize]) -> bool) {
        let mut asked = self.asked.subscribe();
        let enough = asked.wait_for(|asked| is_enough(asked));
        let enough = timeout(Duration::from_mins(1), enough).await;
        assert!(enough.is_ok(), "not within a minute");
    }

    /// The most connections that were open at a time.
    pub(super) fn most_open(&self) -> usize {
        self.most_open.load(Ordering::SeqCst)
    }

    /// Returns when every connection is closed.
    pub(super) async fn until_none_is_open(&self) {
        let closed = async {
            while self.open.load(Ordering::SeqCst) > 0 {
                tokio::task::yield_now().await;
            }
        };
        let closed = timeout(Duration::from_secs(30), closed).await;
        assert!(closed.is_ok(), "{} connections stay open", self.open.load(Ordering::SeqCst));
    }
}

async fn serve(mut stream: TcpStream, trainer: Trainer) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await?);
    }
    match trainer {
        Trainer::Says { status, body } => {
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body.as_bytes()).await?;
        }
        Trainer::Raw(text) => {
            stream.write_all(text.as_bytes()).await?;
            return stream.shutdown().await;
        }
        Trainer::NeverAnswers | Trainer::Refuses => {}
        Trainer::Drips => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n{").await?;
            loop {
                sleep(Duration::from_millis(50)).await;
                stream.write_all(b" ").await?;
            }
        }
        Trainer::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
            loop {
                stream.write_all(b"10\r\n                \r\n").await?;
            }
        }
        Trainer::EndlessHead => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await?;
            loop {
                stream.write_all(&[b'y'; 1000]).await?;
            }
        }
    }
    // The end of the other side.
    stream.read_u8().await.map(|_| ())
}
