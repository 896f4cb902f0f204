//! What a shell is offered: scripts for `kubectl-finetune`, and single words for kubectl's own completion of plugins.

use clap::CommandFactory;

use crate::Arguments;

/// How kubectl asks for words, for `--help`.
pub const HINT: &str =
    "Completion of `kubectl finetune`: put an executable file kubectl_complete-finetune beside kubectl-finetune:
    #!/bin/sh
    exec kubectl-finetune __complete \"$@\"
Completion of `kubectl-finetune` itself: kubectl finetune completion bash|zsh|fish";

/// Cobra's words for what else may be offered.
const NO_FILES: &str = ":4";
const FILES: &str = ":0";

/// The script of a shell.
pub fn script(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "kubectl-finetune", &mut script);
    script
}

/// What may stand where the last word stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// One of these.
    Words(Vec<String>),
    /// The name of a job.
    Job,
    /// A file.
    File,
}

/// What is wanted after `words`, of which the last one is not complete.
pub fn wanted(words: &[String]) -> Wanted {
    let command = Arguments::command();
    let Some((_, before)) = words.split_last() else { return Wanted::Words(Vec::new()) };
    let takes_value = |word: &str| matches!(word, "-n" | "--namespace" | "--context" | "--kubeconfig");
    let mut given = Vec::new();
    let mut rest = before.iter();
    while let Some(word) = rest.next() {
        if takes_value(word) {
            rest.next();
        } else if !word.starts_with('-') {
            given.push(word.as_str());
        }
    }
    let Some(name) = given.first() else {
        let names = command.get_subcommands().filter(|command| !command.is_hide_set());
        return Wanted::Words(names.map(|command| command.get_name().to_owned()).collect());
    };
    match *name {
        "run" => Wanted::File,
        "completion" => Wanted::Words(["bash", "zsh", "fish"].map(str::to_owned).into()),
        "list" => Wanted::Words(Vec::new()),
        _ => Wanted::Job,
    }
}

/// The namespace that `words` name.
pub fn namespace(words: &[String]) -> Option<String> {
    let named = words.windows(2).find(|pair| pair[0] == "-n" || pair[0] == "--namespace").map(|pair| pair[1].clone());
    named.or_else(|| words.iter().find_map(|word| word.strip_prefix("--namespace=").map(str::to_owned)))
}

/// The answer that kubectl reads: a word a line, and a directive.
pub fn answer(candidates: &[String], last: &str, files: Files) -> String {
    let fitting = candidates.iter().filter(|word| word.starts_with(last));
    let words: String = fitting.map(|word| format!("{word}\n")).collect();
    format!("{words}{}\n", if files == Files::Offered { FILES } else { NO_FILES })
}

/// Whether the shell offers files too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// It does.
    Offered,
    /// It does not.
    Kept,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn every_shell_gets_a_script_that_knows_the_commands() {
        use clap_complete::Shell;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(script(shell)).expect("a text");
            assert!(script.contains("suspend") && script.contains("kubectl-finetune"), "{shell}");
        }
    }

    #[test]
    fn kubectl_is_offered_commands_then_names() {
        let Wanted::Words(commands) = wanted(&words("st")) else { panic!("commands come first") };
        assert_eq!(answer(&commands, "st", Files::Kept), "status\nstop\n:4\n");
        assert_eq!(wanted(&words("-n team status su")), Wanted::Job);
        assert_eq!(wanted(&words("run jo")), Wanted::File);
        assert_eq!(wanted(&words("list ")), Wanted::Words(Vec::new()));
        assert_eq!(namespace(&words("status -n team su")).as_deref(), Some("team"));
        assert_eq!(namespace(&words("--namespace=team status ")).as_deref(), Some("team"));
    }
}
