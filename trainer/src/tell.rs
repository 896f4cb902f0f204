//! What is told of a run: to its terminal, its report, its history, plots and metrics.

pub mod display;
pub mod history;
pub mod plot;
pub mod record;
pub mod report;
pub mod serve;
