//! What goes wrong on the way between the operator and the API server, by script.

use super::call::Call;
use super::kind::Kind;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// One object.
    Get,
    /// A collection.
    List,
    /// Changes of a collection.
    Watch,
    /// A new object.
    Create,
    /// An object as a whole.
    Update,
    /// A part of one.
    Patch,
    /// The end of one.
    Delete,
}

impl Verb {
    /// As rights name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
        }
    }

    /// Whether it changes something.
    pub const fn is_write(self) -> bool {
        matches!(self, Self::Create | Self::Update | Self::Patch | Self::Delete)
    }
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered with this code and sentence, and nothing is done.
    Refused(u16, String),
    /// It is done, and answered with this code: a gateway that lost patience.
    DoneAndRefused(u16),
    /// The connection breaks before the API server saw the request.
    Lost,
    /// The connection breaks after the API server did it.
    DoneAndLost,
    /// No answer ever comes, and nothing is done.
    Hangs,
    /// No answer ever comes, and it is done.
    DoneAndHangs,
    /// The operator dies before the API server saw the request.
    CrashBefore,
    /// The operator dies when the API server has done it.
    CrashAfter,
}

impl Fault {
    /// Whether the API server does what is asked.
    pub const fn is_done(&self) -> bool {
        matches!(self, Self::DoneAndRefused(_) | Self::DoneAndLost | Self::DoneAndHangs | Self::CrashAfter)
    }
}

/// Requests that a fault befalls.
#[derive(Clone, Debug)]
pub struct Calls {
    verb: Option<Verb>,
    resource: Option<String>,
    name: String,
    writes_only: bool,
    passed_over: usize,
    times: usize,
}

impl Calls {
    /// Requests of a verb for a kind, the first one of them.
    pub fn to(verb: Verb, kind: Kind) -> Self {
        Self { verb: Some(verb), resource: Some(kind.plural().to_owned()), ..Self::writes() }
            .writes_only(verb.is_write())
    }

    /// Writes of statuses of FineTuneJobs.
    pub fn to_status() -> Self {
        Self { verb: Some(Verb::Patch), resource: Some("finetunejobs/status".to_owned()), ..Self::writes() }
    }

    /// Whatever writes.
    pub fn writes() -> Self {
        Self { verb: None, resource: None, name: String::new(), writes_only: true, passed_over: 0, times: 1 }
    }

    fn writes_only(self, writes_only: bool) -> Self {
        Self { writes_only, ..self }
    }

    /// Only for objects whose name has `part`.
    #[must_use]
    pub fn named(self, part: &str) -> Self {
        Self { name: part.to_owned(), ..self }
    }

    /// Not the first `count` of them.
    #[must_use]
    pub fn after(self, count: usize) -> Self {
        Self { passed_over: count, ..self }
    }

    /// So many of them.
    #[must_use]
    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }

    /// Each of them, until [`super::ApiServer::heal`].
    #[must_use]
    pub fn always(self) -> Self {
        self.times(usize::MAX)
    }

    fn matches(&self, call: &Call) -> bool {
        self.verb.is_none_or(|verb| verb == call.verb)
            && self.resource.as_ref().is_none_or(|resource| *resource == call.place.resource())
            && call.name().contains(&self.name)
            && (!self.writes_only || call.verb.is_write())
    }
}

/// The faults that are still to come.
#[derive(Debug, Default)]
pub struct Faults(Vec<(Calls, Fault)>);

impl Faults {
    /// One more.
    pub fn add(&mut self, calls: Calls, fault: Fault) {
        self.0.push((calls, fault));
    }

    /// No more.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// What befalls a request. Every script counts it, the first one that is due applies.
    pub fn befall(&mut self, call: &Call) -> Option<Fault> {
        let mut due = None;
        for (calls, fault) in self.0.iter_mut().filter(|(calls, _)| calls.matches(call)) {
            if calls.passed_over > 0 {
                calls.passed_over -= 1;
            } else if due.is_none() && calls.times > 0 {
                calls.times = calls.times.saturating_sub(usize::from(calls.times != usize::MAX));
                due = Some(fault.clone());
            }
        }
        self.0.retain(|(calls, _)| calls.times > 0);
        due
    }
}
