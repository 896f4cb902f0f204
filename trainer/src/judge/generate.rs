//! Greedy generation for many prompts at once, with a key-value cache.
//!
//! What all prompts begin with (a few-shot prompt's examples) is computed once. An answer that ends makes room for the next
//! prompt, whose tokens go through the model together with the others' newest (continuous batching).

mod cache;

use std::ops::Range;

use tch::Device;

use self::cache::Cache;
pub(crate) use self::cache::{copied_bytes, is_plain, pass_bytes};
use crate::compute::linear::Adapters;
use crate::compute::memory::guard_memory;
use crate::compute::shim::decode::whole_columns;
use crate::data::tokenizer::Tokenizer;
use crate::ground::stop::Stop;
use crate::model::Decoder;

/// How far to generate.
#[derive(Clone, Debug)]
pub struct Limits<'a> {
    /// New tokens per prompt, the end token included.
    pub max_new_tokens: i64,
    /// Tokens that end an answer.
    pub end_tokens: Vec<u32>,
    /// Text that ends an answer as well.
    pub stop_text: Option<StopText<'a>>,
    /// Tokens that the slots of a cache may have room for together; a prompt that needs more gets a cache of its own. What all
    /// prompts begin with is not counted.
    pub cache_tokens: i64,
}

/// Text that ends an answer, wherever token boundaries lie. White space before the answer does not count.
#[derive(Clone, Copy, Debug)]
pub struct StopText<'a> {
    /// The text.
    pub text: &'a str,
    /// What turns an answer into text.
    pub tokenizer: &'a Tokenizer,
}

impl StopText<'_> {
    fn ends(&self, tokens: &[u32]) -> bool {
        let holds =
            |tokens: &[u32]| self.tokenizer.decode(tokens).is_ok_and(|answer| answer.trim_start().contains(self.text));
        // A token is at least a byte of text: where the newest one completes the stop text, these hold all of it.
        let newest = &tokens[tokens.len().saturating_sub(self.text.len() + 1)..];
        self.tokenizer.decode(newest).is_ok_and(|text| text.contains(self.text)) && holds(tokens)
    }
}

/// Most tokens of prompts that go through the model at once, if one has not more by itself: matrix products are bound by
/// arithmetic with as many, and what memory they take does not grow with the cache.
pub const PROMPT_TOKENS: usize = 2048;
/// Prompts share slots of the cache with others that need up to so many times as many columns.
const WIDEST: i64 = 2;

/// What a prompt was continued with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// New tokens, without the end token, with the stop text.
    pub tokens: Vec<u32>,
    /// Whether the model ended the answer itself.
    pub ended: bool,
    /// New tokens that it took, the end token included.
    pub generated: usize,
}

/// How far answering is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Prompts that are answered.
    pub answered: usize,
    /// New tokens of all answers.
    pub tokens: usize,
}

/// The greedy continuation of each prompt; `None` if a stop was asked for meanwhile. `progress` is told after each token. A prompt
/// has at least one token and at most as many as the model has positions; where it has them all, its answer is empty. Where
/// memory runs out, fewer prompts are computed at once.
pub fn generate(
    model: &Decoder,
    prompts: &[&[u32]],
    adapters: Adapters,
    limits: &Limits,
    stop: &Stop,
    progress: &mut dyn FnMut(Progress),
) -> Option<Vec<Answer>> {
    let shared = shared_prefix(prompts);
    let mut prefix = None;
    if shared > 0 {
        let mut cache = Cache::new(model, 1, shared as i64, None);
        let _ = cache.extend(model, &[(0, &prompts[0][..shared])], adapters, stop)?;
        prefix = Some(cache);
    }
    let questions = prompts.iter().map(|prompt| Question {
        tokens: &prompt[shared..],
        // Positions are a prompt's own: a short one may be answered at length beside one that nearly fills the context.
        room: limits.max_new_tokens.min(model.max_positions() - prompt.len() as i64).max(0) as usize,
    });
    let questions: Vec<Question> = questions.collect();
    // Those of similar length share slots, so that little of these is empty.
    let mut by_width: Vec<usize> = (0..questions.len()).filter(|&index| questions[index].room > 0).collect();
    by_width.sort_by_key(|&index| (questions[index].width(), index));
    let widths: Vec<i64> = by_width.iter().map(|&index| questions[index].width()).collect();
    let mut answers = vec![Answer::default(); prompts.len()];
    let unasked = questions.len() - by_width.len();
    in_batches(&widths, limits.cache_tokens, &mut |rows, slots| {
        let batch: Vec<Question> = by_width[rows.clone()].iter().map(|&index| questions[index]).collect();
        let mut cache = Cache::new(model, slots, widths[rows.end - 1], prefix.as_ref());
        let tokens: usize = answers.iter().map(|answer| answer.generated).sum();
        let mut told = |of_batch: Progress| {
            let answered = unasked + rows.start + of_batch.answered;
            progress(Progress { answered, tokens: tokens + of_batch.tokens });
        };
        let batch_answers = answer_all(model, &mut cache, &batch, adapters, limits, stop, &mut told)?;
        for (&index, answer) in by_width[rows].iter().zip(batch_answers) {
            answers[index] = answer;
        }
        Some(())
    })?;
    Some(answers)
}

/// A prompt without what all have in common.
#[derive(Clone, Copy)]
struct Question<'a> {
    tokens: &'a [u32],
    /// New tokens that its answer may have.
    room: usize,
}

impl Question<'_> {
    /// Columns of the cache that prompt and answer take: the answer's last token is not fed back.
    fn width(&self) -> i64 {
        (self.tokens.len() + self.room) as i64 - 1
    }
}

/// Does `work` for all rows, given their ascending widths: so many rows, in at most so many slots of the cache as `cache_tokens`
/// allow at the widest of them, at least one. Slots are as many as keep them all busy until the end, if all rows take equally
/// long. Where memory runs out, the same rows go on with half the slots; where it does not suffice for one, libtorch's panic
/// goes on.
fn in_batches(
    widths: &[i64],
    mut cache_tokens: i64,
    work: &mut dyn FnMut(Range<usize>, usize) -> Option<()>,
) -> Option<()> {
    let mut done = 0;
    while done < widths.len() {
        let rows = widths[done..].iter().take_while(|&&width| width <= WIDEST * widths[done]).count();
        let widest = whole_columns(widths[done + rows - 1]);
        let most = (cache_tokens / widest).max(1) as usize;
        let slots = rows.div_ceil(rows.div_ceil(most));
        match guard_memory(|| work(done..done + rows, slots)) {
            Ok(finished) => {
                finished?;
                done += rows;
            }
            Err(_) if slots > 1 => cache_tokens = slots as i64 * widest / 2,
            Err(message) => panic!("{message}"),
        }
    }
    Some(())
}

/// Length of what all prompts begin with, leaving each at least one token of its own.
fn shared_prefix(prompts: &[&[u32]]) -> usize {
    let Some((first, rest)) = prompts.split_first() else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    rest.iter().fold(first.len().saturating_sub(1), |shared, prompt| {
        let common = first.iter().zip(prompt.iter()).take_while(|(a, b)| a == b).count();
        shared.min(common).min(prompt.len().saturating_sub(1))
    })
}

/// A question that is being answered: its number, its slot, and its newest token once there is one.
struct Running {
    question: usize,
    slot: usize,
    newest: Option<[u32; 1]>,
}

/// How many of the waiting questions begin: as many as there are slots for, and as their tokens go through the model at once.
fn admitted(waiting: &[Question], slots: usize) -> usize {
    let mut new_tokens = 0;
    let fit = waiting.iter().take(slots).take_while(|question| {
        new_tokens += question.tokens.len();
        new_tokens <= PROMPT_TOKENS.max(question.tokens.len())
    });
    fit.count()
}

/// Answers all questions in the cache's slots, as they become free.
fn answer_all(
    model: &Decoder,
    cache: &mut Cache,
    questions: &[Question],
    adapters: Adapters,
    limits: &Limits,
    stop: &Stop,
    progress: &mut dyn FnMut(Progress),
) -> Option<Vec<Answer>> {
    let mut tokens = 0;
    let mut answers = vec![Answer::default(); questions.len()];
    let mut waiting = 0..questions.len();
    let mut free: Vec<usize> = (0..cache.slots()).rev().collect();
    let mut running: Vec<Running> = Vec::new();
    loop {
        let answered = questions.len() - waiting.len() - running.len();
        progress(Progress { answered, tokens });
        let left = free.len() - admitted(&questions[waiting.clone()], free.len());
        for (slot, question) in free.drain(left..).zip(waiting.by_ref()) {
            cache.clear(slot);
            running.push(Running { question, slot, newest: None });
        }
        if running.is_empty() {
            return Some(answers);
        }
        let new = running
            .iter()
            .map(|row| (row.slot, row.newest.as_ref().map_or(questions[row.question].tokens, |t| &t[..])));
        let hidden_rh = cache.extend(model, &new.collect::<Vec<_>>(), adapters, stop)?;
        let next = model.likeliest(&hidden_rh).to_device(Device::Cpu);
        let next: Vec<i64> = Vec::try_from(next).expect("int64 tokens");
        for (row, token) in running.iter_mut().zip(next) {
            row.newest = Some([token as u32]);
            tokens += 1;
            answers[row.question].add(token as u32, limits);
        }
        running.retain(|row| {
            let answer = &answers[row.question];
            let goes_on = !answer.ended && answer.tokens.len() < questions[row.question].room;
            if !goes_on {
                free.push(row.slot);
            }
            goes_on
        });
    }
}

impl Answer {
    fn add(&mut self, token: u32, limits: &Limits) {
        self.generated += 1;
        if limits.end_tokens.contains(&token) {
            self.ended = true;
        } else {
            self.tokens.push(token);
            self.ended = limits.stop_text.is_some_and(|stop_text| stop_text.ends(&self.tokens));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_begin_as_their_tokens_go_through_the_model_at_once() {
        let admitted = |lengths: &[usize], slots| {
            let prompts: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
            let questions: Vec<Question> = prompts.iter().map(|tokens| Question { tokens, room: 1 }).collect();
            super::admitted(&questions, slots)
        };
        assert_eq!(admitted(&[1000, 1000, 48, 1], 9), 3);
        assert_eq!(admitted(&[1000, 1000, 48, 1], 2), 2);
        // One that has more by itself begins alone.
        assert_eq!(admitted(&[5000, 1], 9), 1);
        assert_eq!(admitted(&[1, 5000], 9), 1);
        assert_eq!(admitted(&[], 9), 0);
    }

    #[test]
    fn where_memory_runs_out_the_same_rows_go_on_in_fewer_slots() {
        // Slots and the rows that are done after each batch.
        let batches = |at_once: usize, cache_tokens: i64| {
            let mut done = Vec::new();
            let mut work = |rows: Range<usize>, slots: usize| {
                assert!(slots <= at_once, "CUDA out of memory. Tried to allocate 2.00 GiB");
                done.push((slots, rows.end));
                Some(())
            };
            in_batches(&[10, 10, 10, 20, 21, 30, 30], cache_tokens, &mut work).map(|()| done)
        };
        assert_eq!(batches(9, 1000), Some(vec![(4, 4), (3, 7)]));
        assert_eq!(batches(9, 65), Some(vec![(2, 4), (2, 7)]));
        assert_eq!(batches(2, 1000), Some(vec![(2, 4), (2, 7)]));
        assert_eq!(batches(1, 1000), Some(vec![(1, 4), (1, 7)]));
        assert!(std::panic::catch_unwind(|| batches(0, 1000)).is_err());
    }
}
