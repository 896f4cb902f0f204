//! The rows of one file: read, split, tokenised, cut to a length, and named in findings.

use std::path::Path;

use crds::run::{DataFormat, ProblemAction};
use rayon::prelude::*;

use super::Error;
use super::check::{self, RowHash};
use super::example::Example;
use super::format::{Row, read_rows};
use super::mask::Tokeniser;

/// Rows of one file with what is known of them.
pub(super) struct File<'a> {
    pub(super) path: &'a Path,
    pub(super) rows: Vec<Row>,
    pub(super) hashes: Vec<RowHash>,
}

impl<'a> File<'a> {
    pub(super) fn read(path: &'a Path, format: DataFormat) -> Result<Self, Error> {
        let rows = read_rows(path, format)?;
        let hashes = rows.par_iter().map(|row| check::row_hash(&row.content)).collect();
        Ok(Self { path, rows, hashes })
    }

    /// The rows whose hash satisfies `keep`.
    pub(super) fn part(&self, keep: impl Fn(&RowHash) -> bool) -> Self {
        let kept = || (0..self.rows.len()).filter(|&index| keep(&self.hashes[index]));
        Self {
            path: self.path,
            rows: kept().map(|index| self.rows[index].clone()).collect(),
            hashes: kept().map(|index| self.hashes[index]).collect(),
        }
    }

    /// Cuts examples to `limit` tokens and drops those that have nothing left to train. Gives the rows that lost trained
    /// tokens and those that were dropped.
    pub(super) fn fit(examples: &mut Vec<Example>, limit: usize) -> Fitted {
        let is_cut = |example: &Example| example.trained.get(limit..).is_some_and(|cut| cut.contains(&true));
        let cut = (0..examples.len()).filter(|&index| is_cut(&examples[index])).collect();
        for example in examples.iter_mut() {
            example.tokens.truncate(limit);
            example.trained.truncate(limit);
        }
        let dropped = (0..examples.len()).filter(|&index| examples[index].num_trained() == 0).collect();
        examples.retain(|example| example.num_trained() > 0);
        Fitted { cut, dropped }
    }

    pub(super) fn examples(&self, tokeniser: &Tokeniser) -> Result<Vec<Example>, Error> {
        let tokenise = |row: &Row| {
            let failed = |source| Error::Row { path: self.path.into(), line: row.line, source };
            tokeniser.example(&row.content).map_err(failed)
        };
        self.rows.par_iter().map(tokenise).collect()
    }

    /// Applies `onProblem` to findings at `indices`: an error that names the first, or a warning.
    pub(super) fn judge(
        &self,
        indices: &[usize],
        action: ProblemAction,
        warnings: &mut Vec<String>,
        message: impl Fn(usize) -> String,
    ) -> Result<(), Error> {
        let Some(&first) = indices.first() else { return Ok(()) };
        let (line, message) = (self.rows[first].line, message(indices.len()));
        match action {
            ProblemAction::Fail => Err(Error::Problem { path: self.path.into(), line, message }),
            ProblemAction::Warn => {
                warnings.push(format!("{}:{line}: {message}", self.path.display()));
                Ok(())
            }
        }
    }
}

/// Indices of rows that the sequence length concerns.
pub(super) struct Fitted {
    /// They lost trained tokens.
    pub(super) cut: Vec<usize>,
    /// Nothing of them is trained.
    pub(super) dropped: Vec<usize>,
}
