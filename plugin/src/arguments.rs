//! The command line: what may be said, and how it is explained.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use crds::finetunejob::Phase;
use crds::run::PodStage;
use k8s_openapi::jiff::SignedDuration;

use crate::cluster::Target;
use crate::completion::HINT;
use crate::outcome::EXIT_CODES;

/// Runs, follows and explains fine-tunings
#[derive(Debug, Parser)]
#[command(name = "kubectl-finetune", bin_name = "kubectl finetune", version, after_help = HINT)]
pub struct Arguments {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What is to be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check a file, apply it (or create it, where it has generateName), and follow the job until it ends
    #[command(after_help = EXIT_CODES)]
    Run {
        /// A FineTuneJob in YAML; - is standard input
        file: PathBuf,
        /// Return when the job is applied
        #[arg(long)]
        detach: bool,
        /// Set fields of the file that others have set
        #[arg(long)]
        force_conflicts: bool,
    },
    /// All jobs, one a line
    List {
        /// In all namespaces
        #[arg(short = 'A', long)]
        all_namespaces: bool,
        #[command(flatten)]
        output: Output,
    },
    /// One page: progress, metrics, validation, plan, attempts, and what to do next
    Status {
        /// Name of the job
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Follow a job until it ends: a bar on a terminal, a line a change elsewhere
    #[command(after_help = EXIT_CODES)]
    Watch {
        /// Name of the job
        name: String,
    },
    /// Wait until a job ends, well or badly
    #[command(after_help = EXIT_CODES)]
    Wait {
        /// Name of the job
        name: String,
        /// Until it is in this phase or beyond it, for example Training; it may still end before
        #[arg(long = "for", value_name = "PHASE", value_parser = phase)]
        until: Option<Phase>,
        /// At most so long, for example 90s or 1h30m
        #[arg(long, value_parser = timeout)]
        timeout: Option<Duration>,
    },
    /// What the trainer writes
    Logs {
        /// Name of the job
        name: String,
        /// Of this stage; without it of the newest pod
        #[arg(long, value_enum)]
        stage: Option<StageName>,
        /// Of this attempt; without it of the newest
        #[arg(long)]
        attempt: Option<i32>,
        /// Go on until the pod ends
        #[arg(short, long)]
        follow: bool,
        /// The last so many lines
        #[arg(long)]
        tail: Option<i64>,
    },
    /// The loss curve, in the terminal and as SVG
    Plot {
        /// Name of the job
        #[arg(required_unless_present = "file")]
        name: Option<String>,
        /// Write a picture here
        #[arg(long)]
        svg: Option<PathBuf>,
        /// Take the points from this Prometheus; without it from the logs of the training pods
        #[arg(long, value_name = "URL", conflicts_with = "file")]
        prometheus: Option<String>,
        /// Take the points from a copy of metrics.jsonl
        #[arg(long, value_name = "PATH")]
        file: Option<PathBuf>,
    },
    /// End training at its next step, evaluate, publish; cannot be taken back
    Stop {
        /// Name of the job
        name: String,
    },
    /// Hold a job: it writes a checkpoint and gives its accelerators back
    Suspend {
        /// Name of the job
        name: String,
    },
    /// Let a held job go on
    Resume {
        /// Name of the job
        name: String,
    },
    /// What jobs used and cost
    Cost {
        /// Names of the jobs; without them all
        names: Vec<String>,
        /// In all namespaces
        #[arg(short = 'A', long, conflicts_with = "names")]
        all_namespaces: bool,
        #[command(flatten)]
        output: Output,
    },
    /// A completion script for kubectl-finetune
    Completion {
        /// For this shell
        shell: clap_complete::Shell,
    },
    /// Words for kubectl's own completion
    #[command(name = "__complete", hide = true, disable_help_flag = true)]
    Complete {
        /// All words, the last one not complete
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// For people, or for programs
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// For people, or for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables and pages
    Text,
    /// The objects
    Json,
    /// The objects
    Yaml,
}

/// The stages of a job, as arguments.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum StageName {
    /// Fetches, checks and tokenises
    Prepare,
    /// Trains and judges
    Train,
    /// Writes the output
    Publish,
    /// Reads the last word of a lost pod
    Report,
}

impl From<StageName> for PodStage {
    fn from(name: StageName) -> Self {
        match name {
            StageName::Prepare => Self::Prepare,
            StageName::Train => Self::Train,
            StageName::Publish => Self::Publish,
            StageName::Report => Self::Report,
        }
    }
}

/// As `kubectl wait` has it (`phase=Training`), or the name alone; upper case or lower.
fn phase(text: &str) -> Result<Phase, String> {
    let name = text.strip_prefix("phase=").unwrap_or(text);
    let found = Phase::ALL.into_iter().find(|phase| format!("{phase:?}").eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("expected one of {}", Phase::ALL.map(|phase| format!("{phase:?}")).join(", ")))
}

fn timeout(text: &str) -> Result<Duration, String> {
    let parsed: Option<Duration> =
        text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    parsed.ok_or_else(|| "expected a duration, for example 90s or 1h30m".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent_and_exit_codes_are_in_the_help() {
        Arguments::command().debug_assert();
        let mut command = Arguments::command();
        for name in ["run", "watch", "wait"] {
            let help = command.find_subcommand_mut(name).expect("a command").render_help().to_string();
            for line in EXIT_CODES.lines() {
                assert!(help.contains(line.trim()), "{name}: {line}: {help}");
            }
        }
    }

    #[test]
    fn phases_and_times_are_read_as_people_write_them() {
        for text in ["Training", "training", "phase=Training"] {
            assert_eq!(phase(text), Ok(Phase::Training));
        }
        let error = phase("Done").expect_err("no such phase");
        assert!(error.ends_with("Suspended, Succeeded, Failed"), "{error}");
        for (text, seconds) in [("90s", 90), ("1h", 3600), ("1h30m", 5400)] {
            assert_eq!(timeout(text), Ok(Duration::from_secs(seconds)));
        }
        assert!(timeout("soon").is_err() && timeout("-1h").is_err());
    }

    #[test]
    fn a_plot_needs_a_name_or_a_file_and_one_source() {
        let parses = |words: &str| Arguments::try_parse_from(words.split(' ')).is_ok();
        assert!(parses("kubectl-finetune plot bot") && parses("kubectl-finetune plot --file metrics.jsonl"));
        assert!(
            !parses("kubectl-finetune plot") && !parses("kubectl-finetune plot bot --file x --prometheus http://y")
        );
        assert!(parses("kubectl-finetune -n team status bot") && parses("kubectl-finetune status bot -n team -o json"));
    }
}
