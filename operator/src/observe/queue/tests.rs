use kube::runtime::reflector;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

use super::*;
use crate::fake::{self, Request, refusal};

const PATH: &str = "/apis/kueue.x-k8s.io/";

fn child(name: &str, uid: &str, suspend: bool) -> Job {
    let labels = json!({JOB_NAME_LABEL: name});
    let metadata = json!({"namespace": "team", "name": format!("{name}-train-1"), "uid": uid, "labels": labels});
    serde_json::from_value(json!({"metadata": metadata, "spec": {"suspend": suspend, "template": {}}})).expect("a Job")
}

fn workload(name: &str, uid: &str, said: &[(&str, &str, &str)]) -> Value {
    let condition = |(kind, status, message): &(&str, &str, &str)| json!({"type": kind, "status": status, "reason": "Pending", "message": message});
    json!({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
        "metadata": {
            "namespace": "team", "name": format!("job-{name}"), "resourceVersion": "5",
            "labels": {JOB_UID_LABEL: uid},
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": format!("{name}-train-1"), "uid": uid}],
        },
        "status": {"conditions": said.iter().map(condition).collect::<Vec<_>>()},
    })
}

fn object(value: &Value) -> DynamicObject {
    serde_json::from_value(value.clone()).expect("an object")
}

fn list(items: &[Value]) -> (u16, String) {
    (
        200,
        json!({"kind": "WorkloadList", "apiVersion": "v1", "metadata": {"resourceVersion": "5"}, "items": items})
            .to_string(),
    )
}

/// The API server of a test: what it was asked, and what it answers, in place of what it holds.
struct Server {
    asked: Arc<Mutex<Vec<Request>>>,
    queues: Arc<Queues>,
    told: UnboundedReceiver<JobRef>,
    jobs: Store<Job>,
}

impl Server {
    /// Watches against `answer` until `until` ends.
    async fn run<F>(
        answer: impl Fn(Request) -> F + Send + Sync + 'static,
        until: impl AsyncFnOnce(&mut Self),
    ) -> Vec<Request>
    where
        F: Future<Output = (u16, String)> + Send,
    {
        let (jobs, mut writer) = reflector::store::<Job>();
        for job in [child("bot", "u-1", true), child("other", "u-2", true), child("runs", "u-3", false)] {
            writer.apply_watcher_event(&Event::Apply(job));
        }
        let asked: Arc<Mutex<Vec<Request>>> = Arc::default();
        let log = Arc::clone(&asked);
        let client = fake::client(move |request: Request| {
            log.lock().expect("a log").push(request.clone());
            answer(request)
        });
        let (tell, told) = unbounded_channel();
        let queues = Arc::<Queues>::default();
        let watching = watch(client, None, jobs.clone(), Arc::clone(&queues), tell);
        let mut server = Self { asked, queues, told, jobs };
        tokio::select! {
            () = watching => panic!("it ended"),
            () = until(&mut server) => {}
        }
        server.asked.lock().expect("a log").clone()
    }

    /// The next jobs that are to be looked at, in the order of their names.
    async fn next(&mut self, count: usize) -> Vec<String> {
        let mut names = Vec::new();
        for _ in 0..count {
            names.push(self.told.recv().await.expect("it watches").name);
        }
        names.sort();
        names
    }
}

#[tokio::test(start_paused = true)]
async fn many_that_wait_cost_one_list_and_one_watch() {
    let answer = async |request: Request| {
        if request.path != format!("{PATH}v1beta2/workloads") {
            return refusal(404, "NotFound");
        }
        if !request.is_watch() {
            return list(&[workload("bot", "u-1", &[("QuotaReserved", "False", "3 more needed")])]);
        }
        if request.query.contains("resourceVersion=5") {
            // Another team's Workload, one that counts down, one whose quota is there, one that goes.
            let events = [
                ("ADDED", workload("stranger", "u-9", &[("QuotaReserved", "False", "no quota")])),
                ("MODIFIED", workload("bot", "u-1", &[("QuotaReserved", "False", "2 more needed")])),
                ("ADDED", workload("other", "u-2", &[("QuotaReserved", "False", "2 more needed")])),
                (
                    "MODIFIED",
                    workload("other", "u-2", &[("QuotaReserved", "True", ""), ("Admitted", "False", "a check")]),
                ),
                (
                    "MODIFIED",
                    workload("other", "u-2", &[("Evicted", "True", "by another"), ("QuotaReserved", "False", "")]),
                ),
                ("DELETED", workload("other", "u-2", &[])),
            ];
            let lines = events.iter().enumerate().map(|(number, (kind, object))| {
                let mut object = object.clone();
                object["metadata"]["resourceVersion"] = (number + 6).to_string().into();
                format!("{}\n", json!({"type": kind, "object": object}))
            });
            return (200, lines.collect());
        }
        std::future::pending().await
    };
    let asked = Server::run(answer, async |server| {
        // Both that are held, once the list is complete, and `bot` of which it says something.
        assert_eq!(server.next(3).await, ["bot", "bot", "other"]);
        assert_eq!(server.next(4).await, ["other"; 4], "the stranger is nobody's, and what counts down is no news");
        let waiting = |text: &str| Some(QueueSeen::Waiting(text.into()));
        assert_eq!(
            server.queues.seen("u-1"),
            waiting("Pending: 3 more needed"),
            "the first of the same meaning stands"
        );
        assert_eq!(server.queues.seen("u-2"), waiting("the queue's controller has not looked at the Job yet"));
        for _ in 0..2000 {
            server.queues.seen("u-1");
            sleep(Duration::from_secs(1)).await;
        }
        assert!(server.told.try_recv().is_err());
    })
    .await;
    let kinds: Vec<bool> = asked.iter().map(Request::is_watch).collect();
    assert_eq!(kinds, [false, false, true, true], "is it served, what is there, what changes, and on");
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_comes_later_is_found_and_one_that_goes_is_missed() {
    // Served in the older version after ten minutes, and for ten minutes.
    let start = Instant::now();
    let minutes = move || start.elapsed().as_secs() / 60;
    let answer = move |request: Request| async move {
        let is_there = request.path == format!("{PATH}v1beta1/workloads") && (10..20).contains(&minutes());
        if !is_there {
            return (404, "404 page not found\n".into());
        }
        if request.is_watch() {
            sleep(Duration::from_mins(2)).await;
            return if minutes() < 20 { (200, String::new()) } else { refusal(410, "Expired") };
        }
        list(&[])
    };
    let asked = Server::run(answer, async |server| {
        assert_eq!(server.queues.seen("u-1"), None, "nobody was asked yet");
        assert_eq!(server.next(2).await, ["bot", "other"]);
        assert_eq!(server.queues.seen("u-1"), Some(QueueSeen::ControllerMissing));
        // Whoever waits is looked at every few seconds.
        let waiting = async {
            loop {
                server.queues.seen("u-1");
                sleep(Duration::from_secs(1)).await;
            }
        };
        let mut told = Vec::new();
        tokio::select! {
            () = waiting => {}
            job = server.told.recv() => told.extend(job),
        }
        assert!((10..=11).contains(&minutes()), "found after {} minutes", minutes());
        assert!(matches!(server.queues.seen("u-1"), Some(QueueSeen::Waiting(_))));
        told.extend(server.told.recv().await);
        assert_eq!(server.next(2).await, ["bot", "other"], "and when it is gone");
        assert!((20..=23).contains(&minutes()), "missed after {} minutes", minutes());
        assert_eq!(server.queues.seen("u-1"), Some(QueueSeen::ControllerMissing));
        sleep(Duration::from_hours(1)).await;
    })
    .await;
    let looks = asked.iter().filter(|request| request.path.contains("v1beta2")).count();
    assert!((30..80).contains(&looks), "{looks} looks: four a minute while somebody waits, else one in three minutes");
}

#[tokio::test(start_paused = true)]
async fn a_right_that_lacks_is_told_in_the_status() {
    let asked = Server::run(
        async |_| refusal(403, "Forbidden"),
        async |server| {
            assert_eq!(server.next(2).await, ["bot", "other"]);
            let Some(QueueSeen::Waiting(message)) = server.queues.seen("u-1") else { panic!("something is said") };
            assert!(message.contains("may not watch workloads"), "{message}");
            sleep(Duration::from_mins(2)).await;
            assert!(server.told.try_recv().is_err(), "it is told once");
            assert_eq!(server.jobs.len(), 3);
        },
    )
    .await;
    assert!(asked.len() > 2, "and asked for again");
}

#[test]
fn a_list_takes_the_place_of_what_was_known() {
    let queues = Queues::default();
    let says = |name: &str, uid: &str, text: &str| object(&workload(name, uid, &[("QuotaReserved", "False", text)]));
    queues.begin_list();
    assert!(queues.note(&says("a", "u-1", "no quota")) && queues.note(&says("b", "u-2", "no quota")));
    assert_eq!(queues.seen("u-1"), None, "a list that is not complete is no knowledge");
    assert!(queues.end_list());
    // The watch was down; `a` went, and `b` was made anew under another name.
    queues.begin_list();
    assert!(!queues.note(&says("c", "u-2", "no quota")), "it says the same");
    assert!(!queues.end_list());
    let not_yet = Some(QueueSeen::Waiting("the queue's controller has not looked at the Job yet".into()));
    assert_eq!(queues.seen("u-1"), not_yet);
    assert!(!queues.forget(&says("b", "u-2", "")), "the old one's end says nothing");
    assert_ne!(queues.seen("u-2"), not_yet);
    assert!(queues.forget(&says("c", "u-2", "")));
    assert_eq!(queues.seen("u-2"), not_yet);
    assert!(!queues.note(&object(&json!({"metadata": {"name": "of-no-job"}}))));
}

#[test]
fn what_a_workload_waits_for_now_is_told() {
    let mut checked = workload("bot", "u", &[("QuotaReserved", "True", ""), ("Admitted", "False", "")]);
    checked["status"]["admissionChecks"] = json!([
        {"name": "budget", "state": "Ready", "message": "within it"},
        {"name": "capacity", "state": "Pending", "message": "asked for 1 node"},
    ]);
    let evicted =
        workload("bot", "u", &[("Evicted", "True", "preempted by bat"), ("QuotaReserved", "False", "1 gpu missing")]);
    let told = |object: Value| seen(&serde_json::from_value(object).expect("a Workload"));
    assert_eq!(told(checked), QueueSeen::Waiting("capacity: asked for 1 node".into()));
    let QueueSeen::Evicted(message) = told(evicted) else { panic!("it was evicted") };
    assert!(message.contains("preempted by bat; now ") && message.ends_with("1 gpu missing"), "{message}");
}
