use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::*;
use crate::fake::{self, Request, refusal};

const PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/system/leases";

#[test]
fn a_lease_is_taken_when_nobody_renews_it() {
    let held_by =
        |holder: Option<&str>| LeaseSpec { holder_identity: holder.map(str::to_owned), ..LeaseSpec::default() };
    let duration = Duration::from_secs(15);
    for (holder, unchanged, expected) in [
        (None, 0, Decision::Acquire),
        (Some(""), 0, Decision::Acquire),
        (Some("us"), 100, Decision::Renew),
        (Some("them"), 14, Decision::Wait),
        (Some("them"), 15, Decision::Acquire),
    ] {
        let found = decide(&held_by(holder), "us", Duration::from_secs(unchanged), duration);
        assert_eq!(found, expected, "{holder:?} unchanged for {unchanged} s");
    }
}

/// What the server does with a request, by its number.
#[derive(Clone, Copy, Debug)]
enum Does {
    /// What it is asked to.
    Answer,
    /// Nothing, ever.
    Hang,
    /// What it is asked to, and then says nothing.
    WriteAndHang,
    /// It answers that it cannot.
    Fail,
    /// Somebody else writes himself in first.
    LoseIt,
}

/// A lease in one place, as an API server keeps it.
#[derive(Debug, Default)]
struct Kept {
    lease: Option<Value>,
    version: u64,
    requests: usize,
}

impl Kept {
    fn write(&mut self, mut lease: Value) -> Value {
        self.version += 1;
        lease["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.lease = Some(lease.clone());
        lease
    }

    fn answer(&mut self, request: &Request) -> (u16, String) {
        let version = |lease: &Value| lease["metadata"]["resourceVersion"].clone();
        match (request.method.as_str(), &self.lease) {
            ("GET", None) => refusal(404, "NotFound"),
            ("GET", Some(lease)) => (200, lease.to_string()),
            ("POST", Some(_)) => refusal(409, "AlreadyExists"),
            ("PUT", Some(lease)) if version(lease) != version(&request.body) => refusal(409, "Conflict"),
            ("POST", None) | ("PUT", Some(_)) => (200, self.write(request.body.clone()).to_string()),
            (method, _) => panic!("{method} {}", request.path),
        }
    }
}

/// An elector, its lease, and what its server does with the requests after the first two, which take it.
fn elector(does: impl Fn(usize) -> Does + Send + Sync + 'static) -> (Elector, Arc<Mutex<Kept>>) {
    let kept: Arc<Mutex<Kept>> = Arc::default();
    let shared = Arc::clone(&kept);
    let client = fake::client(move |request: Request| {
        assert!(request.path.starts_with(PATH), "{}", request.path);
        let mut kept = shared.lock().expect("one at a time");
        kept.requests += 1;
        let does = kept.requests.checked_sub(3).map_or(Does::Answer, &does);
        let answer = match does {
            Does::Hang => None,
            Does::Fail => Some(refusal(500, "InternalError")),
            Does::Answer => Some(kept.answer(&request)),
            Does::WriteAndHang => {
                kept.answer(&request);
                None
            }
            Does::LoseIt => {
                let them = json!({"metadata": {"name": "op"}, "spec": {"holderIdentity": "them"}});
                kept.write(them);
                Some(kept.answer(&request))
            }
        };
        async move {
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        }
    });
    let settings = Settings {
        namespace: "system".into(),
        name: "op".into(),
        identity: "us".into(),
        lease_duration: Duration::from_secs(15),
        renew_deadline: Duration::from_secs(10),
        retry_period: Duration::from_secs(2),
    };
    (Elector::new(client, settings), kept)
}

/// Holds the lease for ten minutes at most; after how many seconds it was given up.
async fn kept_for(does: impl Fn(usize) -> Does + Send + Sync + 'static) -> Option<u64> {
    let (mut elector, kept) = elector(does);
    elector.acquire().await;
    assert_eq!(kept.lock().expect("one at a time").requests, 2, "a look and a write take it");
    let began = Instant::now();
    timeout(Duration::from_mins(10), elector.keep()).await.ok().map(|()| began.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_hangs_costs_no_leadership() {
    assert_eq!(kept_for(|_| Does::Answer).await, None);
    for hangs in [Does::Hang, Does::WriteAndHang, Does::Fail] {
        // Whichever request of a renewal it is, and though the next one fares no better.
        for first in 0..8 {
            let kept = kept_for(move |number| if (first..first + 2).contains(&number) { hangs } else { Does::Answer });
            assert_eq!(kept.await, None, "{hangs:?} from request {first} on");
        }
        // One in five, for ever.
        let kept = kept_for(move |number| if number % 5 == 0 { hangs } else { Does::Answer });
        assert_eq!(kept.await, None, "{hangs:?} now and then");
    }
}

#[tokio::test(start_paused = true)]
async fn leadership_ends_in_time_where_nothing_is_written() {
    for stops in [Does::Hang, Does::Fail] {
        let kept = kept_for(move |number| if number < 10 { Does::Answer } else { stops }).await;
        // Five renewals, two seconds apart; ten seconds after the last one others may begin to count to fifteen.
        assert_eq!(kept, Some(20), "{stops:?}");
    }
    let kept = kept_for(|number| if number == 3 { Does::LoseIt } else { Does::Answer }).await;
    assert_eq!(kept, Some(6), "the look after the conflict says who it was");
}
