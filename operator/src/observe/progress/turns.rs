//! Whose turn it is to be asked. Each pod has its own times; what it does with a question delays only its likes: those that
//! answer at once, those that were never asked and those that are slow or silent have places of their own.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use super::Asked;

/// Whoever takes longer than this is slow, whatever he says in the end.
const PROMPT: Duration = Duration::from_millis(500);
/// The wait for one that stays silent grows up to so many intervals.
const MOST_INTERVALS: u32 = 4;

/// What is known of a pod from asking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It answers at once.
    Prompt,
    /// It was never asked.
    New,
    /// It answers late, or not at all.
    Slow,
}

impl Standing {
    const ALL: [Self; 3] = [Self::Prompt, Self::New, Self::Slow];

    /// Questions under way at once.
    pub(super) const fn places(self) -> usize {
        match self {
            Self::Prompt | Self::New => 24,
            Self::Slow => 16,
        }
    }
}

/// A question that is under way.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) asked: Asked,
    standing: Standing,
    began: Instant,
}

#[derive(Debug)]
struct Pod {
    asked: Asked,
    standing: Standing,
    /// Questions in a row that were not answered.
    failures: u32,
    /// `None` while it is asked.
    due: Option<Instant>,
    /// It runs no more; the question that is under way ends by itself.
    gone: bool,
}

/// The pods by their UID, and when each is asked next.
#[derive(Debug)]
pub(super) struct Turns {
    interval: Duration,
    pods: HashMap<String, Pod>,
    waiting: [BTreeSet<(Instant, String)>; 3],
    under_way: [usize; 3],
}

impl Turns {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, pods: HashMap::new(), waiting: Default::default(), under_way: [0; 3] }
    }

    /// The pods that run.
    pub(super) fn len(&self) -> usize {
        self.pods.len()
    }

    /// Takes over which pods run now. One that is new is asked at once.
    pub(super) fn follow(&mut self, running: Vec<Asked>, now: Instant) {
        for pod in self.pods.values_mut() {
            pod.gone = true;
        }
        for asked in running {
            let waiting = &mut self.waiting[Standing::New as usize];
            let pod = self.pods.entry(asked.pod_uid.clone()).or_insert_with(|| {
                waiting.insert((now, asked.pod_uid.clone()));
                Pod { asked: asked.clone(), standing: Standing::New, failures: 0, due: Some(now), gone: false }
            });
            pod.gone = false;
            pod.asked = asked;
        }
        let waiting = &mut self.waiting;
        self.pods.retain(|uid, pod| {
            if let Some(due) = pod.due.filter(|_| pod.gone) {
                waiting[pod.standing as usize].remove(&(due, uid.clone()));
                return false;
            }
            true
        });
    }

    /// The next question to ask now.
    pub(super) fn next(&mut self, now: Instant) -> Option<Turn> {
        for standing in self.with_a_place() {
            let waiting = &mut self.waiting[standing as usize];
            if waiting.first().is_some_and(|(due, _)| *due <= now) {
                let (_, uid) = waiting.pop_first()?;
                let pod = self.pods.get_mut(&uid)?;
                pod.due = None;
                self.under_way[standing as usize] += 1;
                return Some(Turn { asked: pod.asked.clone(), standing, began: now });
            }
        }
        None
    }

    /// When there may be a next question, unless one that is under way ends before.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.with_a_place().filter_map(|standing| self.waiting[standing as usize].first()).map(|(due, _)| *due).min()
    }

    /// Notes how a question ended.
    pub(super) fn ended(&mut self, turn: &Turn, was_answered: bool, now: Instant) {
        self.under_way[turn.standing as usize] -= 1;
        let uid = &turn.asked.pod_uid;
        let Some(pod) = self.pods.get_mut(uid) else { return };
        if pod.gone {
            self.pods.remove(uid);
            return;
        }
        pod.failures = if was_answered { 0 } else { pod.failures + 1 };
        let is_prompt = was_answered && now.duration_since(turn.began) <= PROMPT;
        pod.standing = if is_prompt { Standing::Prompt } else { Standing::Slow };
        let intervals = 1 << pod.failures.saturating_sub(1).min(8);
        // With jitter: questions and other periodic work do not fall into step. From the question, so that a late answer does
        // not make the next one later.
        let spread = RandomState::new().hash_one(()) % 100;
        let wait = self.interval.mul_f64(0.9 + spread as f64 / 1000.0) * MOST_INTERVALS.min(intervals);
        let due = now.max(turn.began + wait);
        pod.due = Some(due);
        self.waiting[pod.standing as usize].insert((due, uid.clone()));
    }

    fn with_a_place(&self) -> impl Iterator<Item = Standing> + use<> {
        let under_way = self.under_way;
        Standing::ALL.into_iter().filter(move |standing| under_way[*standing as usize] < standing.places())
    }
}
