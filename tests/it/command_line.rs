//! What a command line gets before any job is looked into, and what a job's user is told besides errors.

use harness::Job;

#[test]
fn exit_codes_are_those_of_the_table() {
    let job = Job::new();
    for (arguments, code, stdout, stderr) in [
        (&["run"][..], 64, "", "error: the following required arguments were not provided"),
        (&["fly"], 64, "", "error: unrecognized subcommand 'fly'"),
        (&["run", "--listen", "nowhere", "job.yaml"], 64, "", "error: invalid value 'nowhere' for '--listen <LISTEN>'"),
        (&["--help"], 0, "Fine-tunes and validates a language model", ""),
        (&["--version"], 0, "finetune-trainer ", ""),
        (&["check", "job.yaml"], 0, "job.yaml: tiny is valid\n", ""),
    ] {
        let outcome = job.trainer(arguments);
        let as_expected = outcome.code == Some(code)
            && outcome.stdout.starts_with(stdout)
            && outcome.stderr.starts_with(stderr)
            && outcome.stderr.is_empty() == stderr.is_empty();
        assert!(as_expected, "{arguments:?}: {outcome:#?}");
    }
}

#[test]
fn a_setting_without_effect_is_warned_about() {
    let job = Job::new();
    job.edit("  checkpoint:", "  resources: {requests: {cpu: \"1\"}}\n  checkpoint:");
    let outcome = job.trainer(&["check", "job.yaml"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(
        outcome.stderr,
        "warning: job.yaml:9:31: spec.resources.requests.cpu: a local run has no scheduler: nothing is reserved\n"
    );
}
