//! What the code may not do, as far as a test can see it: dependency direction, environment, unsafe code, documented
//! commands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::repository;

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a source folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Files under `folder` that contain `text`, sorted.
fn files_with(folder: &str, text: &str) -> Vec<String> {
    let root = repository();
    let mut files: Vec<String> = rust_files(&root.join(folder))
        .into_iter()
        .filter(|path| fs::read_to_string(path).expect("readable").contains(text))
        .map(|path| path.strip_prefix(&root).expect("below the root").display().to_string())
        .collect();
    files.sort();
    files
}

/// Names of the packages that `package` is built from.
fn dependencies(package: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "-p", package, "-e", "normal", "--prefix", "none", "--format", "{p}"])
        .current_dir(repository())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn dependencies_point_one_way() {
    let crds = dependencies("finetune-crds");
    for name in ["finetune-trainer", "tch", "tokio", "reqwest", "hyper", "kube-client"] {
        assert!(!crds.iter().any(|found| found == name), "crds depends on {name}");
    }
    let trainer = dependencies("finetune-trainer");
    for name in ["kube-client", "kube-runtime", "finetune-operator", "finetune-kubectl", "ring"] {
        assert!(!trainer.iter().any(|found| found == name), "the trainer depends on {name}");
    }
    let operator = dependencies("finetune-operator");
    for name in ["finetune-trainer", "tch", "tokenizers", "safetensors", "ring", "openssl-sys"] {
        assert!(!operator.iter().any(|found| found == name), "the operator depends on {name}");
    }
    // What a controller has no use for: bars, completions, a terminal.
    for name in ["finetune-kubectl", "indicatif", "clap_complete", "console"] {
        assert!(!operator.iter().any(|found| found == name), "the operator depends on {name}");
    }
    let plugin = dependencies("finetune-kubectl");
    for name in ["finetune-operator", "finetune-trainer", "tch", "axum", "prometheus", "ring", "openssl-sys"] {
        assert!(!plugin.iter().any(|found| found == name), "the kubectl plugin depends on {name}");
    }
}

#[test]
fn the_environment_is_read_in_main_and_unsafe_code_has_few_places() {
    let reads =
        ["crds/src", "operator/src", "plugin/src", "trainer/src"].map(|folder| files_with(folder, "env::var")).concat();
    let mains = ["operator/src/main.rs", "plugin/src/main.rs", "trainer/src/main.rs"];
    // `UPDATE=1` lets a test write what it compares with; one is started again to crash, one is told what it has to run on.
    let tests = [
        "crds/src/lib.rs",
        "crds/src/reference.rs",
        "operator/src/build/tests.rs",
        "trainer/src/compute/shim/cpu/tests.rs",
        "trainer/src/run/crash.rs",
    ];
    let mut expected = [&mains[..], &tests].concat();
    expected.sort_unstable();
    assert_eq!(reads, expected, "environment variables are read in main.rs only");
    let unsafe_places = [
        "trainer/src/compute/device.rs",
        "trainer/src/compute/shim.rs",
        "trainer/src/compute/shim/cpu.rs",
        "trainer/src/compute/shim/cuda.rs",
        "trainer/src/compute/shim/cuda/driver.rs",
        "trainer/src/compute/shim/decode.rs",
        "trainer/src/model/load.rs",
        "trainer/src/run/crash.rs",
        "trainer/src/store/weights.rs",
    ];
    assert_eq!(files_with("trainer/src", "unsafe "), unsafe_places);
    for library in ["crds", "operator", "plugin"] {
        let code = fs::read_to_string(repository().join(library).join("src/lib.rs")).expect("readable");
        assert!(code.contains("#![forbid(unsafe_code)]"), "{library} allows unsafe code");
    }
}

/// Decisions are pure: they take facts and the time, and reach for neither the API server nor a clock.
#[test]
fn what_decides_in_the_operator_knows_no_client_and_no_clock() {
    for file in [
        "validate.rs",
        "build.rs",
        "build",
        "facts.rs",
        "decide.rs",
        "decide",
        "status.rs",
        "status",
        "policy",
        "events.rs",
    ] {
        let path = repository().join("operator/src").join(file);
        let files = if path.is_dir() { rust_files(&path) } else { vec![path] };
        for path in files {
            let text = fs::read_to_string(&path).expect("readable");
            for word in ["kube::Client", "Api<", "Timestamp::now", "SystemTime", "Instant::now", ".await"] {
                assert!(!text.contains(word), "{} has {word}", path.display());
            }
        }
    }
}

/// Modules of a crate that a file names as `crate::module`, tests left out: they may look at anything.
fn modules_named_in(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let named = code.flat_map(|line| line.split("crate::").skip(1).map(str::to_owned).collect::<Vec<_>>());
    let word = |rest: String| rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>();
    named.map(word).filter(|name| !name.is_empty()).collect()
}

/// What each module of a crate names of its others, tests left out.
fn imports(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let folder = repository().join(folder);
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in rust_files(&folder) {
        let place = path.strip_prefix(&folder).expect("below the folder").with_extension("");
        let mut parts = place.iter().map(|part| part.to_string_lossy().into_owned());
        let module = parts.next().expect("a name");
        if parts.any(|part| part == "tests") || ["main", "lib", "bin"].contains(&module.as_str()) {
            continue;
        }
        let named = modules_named_in(&fs::read_to_string(&path).expect("readable"));
        imports.entry(module).or_default().extend(named);
    }
    for (module, named) in &mut imports {
        named.remove(module);
    }
    imports
}

#[test]
fn no_module_of_the_operator_imports_in_a_circle() {
    let mut imports = imports("operator/src");
    assert!(imports.len() > 10 && imports["controller"].contains("decide"), "{imports:?}");
    // What imports nothing that is left can be taken away; what remains in the end imports itself by way of others.
    while let Some(leaf) = imports.iter().find(|(_, named)| named.is_empty()).map(|(module, _)| module.clone()) {
        imports.remove(&leaf);
        for named in imports.values_mut() {
            named.remove(&leaf);
        }
    }
    assert!(imports.is_empty(), "these import in a circle, or what a circle imports: {imports:#?}");
}

/// From the command line down to arithmetic; beside it what is read, kept and told.
#[test]
fn the_rooms_of_the_trainer_look_one_way() {
    let below = [
        ("ground", ""),
        ("store", "ground"),
        ("compute", "ground"),
        ("data", "store ground"),
        ("source", "store ground"),
        ("tell", "compute store ground"),
        ("model", "compute data store ground"),
        ("train", "model tell compute data store ground"),
        ("judge", "train model tell compute data store ground"),
        ("run", "judge train model tell compute source data store ground"),
        ("cli", "run judge train model tell compute source data store ground"),
    ];
    let imports = imports("trainer/src");
    assert_eq!(imports.len(), below.len(), "every room has its place: {:?}", imports.keys());
    for (room, allowed) in below {
        let allowed: BTreeSet<String> = allowed.split_whitespace().map(str::to_owned).collect();
        // Names of the crate's own, such as `crate::Error`, are of no room.
        let named: BTreeSet<String> =
            imports[room].iter().filter(|name| imports.contains_key(*name)).cloned().collect();
        let wrong: Vec<&String> = named.difference(&allowed).collect();
        assert!(wrong.is_empty(), "{room} looks at {wrong:?}; below it are {allowed:?}");
    }
    assert!(imports["cli"].contains("run") && imports["model"].contains("compute"), "{imports:?}");
}

#[test]
fn the_loop_knows_no_file_and_data_no_tensor() {
    assert_eq!(files_with("trainer/src/data", "use tch"), Vec::<String>::new(), "rows are no tensors");
    // A layer's tests make the parameters that they hold its gradients against; a pass tells who updates them how far it is.
    let named = ["trainer/src/model/decoder.rs", "trainer/src/model/layer/tests.rs", "trainer/src/model/load.rs"];
    assert_eq!(files_with("trainer/src/model", "optim::"), named);
    let train = repository().join("trainer/src/train");
    let mut files = rust_files(&train);
    files.push(train.with_extension("rs"));
    for path in files {
        let code = fs::read_to_string(&path).expect("readable");
        for text in ["std::fs", "std::net", "std::path", "println!"] {
            assert!(!code.contains(text), "{} uses {text}", path.display());
        }
    }
}

/// What a heading is called in a link.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    words
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// Links, files and commands of the pages that users read.
#[test]
fn documented_files_targets_and_commands_exist() {
    let root = repository();
    let makefile = fs::read_to_string(root.join("Makefile")).expect("readable");
    let help = Command::new(harness::trainer_binary()).arg("--help").output().expect("the trainer runs");
    let help = String::from_utf8(help.stdout).expect("UTF-8");
    let (mut links, mut files, mut targets, mut commands) = (0, 0, 0, 0);
    for page in [
        "README.md",
        "docs/architecture.md",
        "docs/benchmarks.md",
        "docs/gitops.md",
        "docs/user-guide.md",
        "docs/profiles.md",
        "docs/security.md",
    ] {
        let text = fs::read_to_string(root.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        let folder = root.join(page).parent().expect("a folder").to_path_buf();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.starts_with("http") && !target.starts_with('#') {
                let (file, heading) = target.split_once('#').unwrap_or((target, ""));
                let linked = folder.join(file);
                assert!(linked.exists(), "{page} links to {target}, which does not exist");
                if !heading.is_empty() {
                    let text = fs::read_to_string(&linked).expect("a page");
                    let anchors = text.lines().filter(|line| line.starts_with('#')).map(anchor);
                    assert!(
                        anchors.into_iter().any(|anchor| anchor == heading),
                        "{page} links to {target}: no such heading"
                    );
                }
                links += 1;
            }
        }
        // What stands in a command or in a sentence.
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && !"._/-".contains(c)) {
            if ["crds/", "operator/", "plugin/", "tests/", "tools/", "trainer/"]
                .iter()
                .any(|folder| word.starts_with(folder))
            {
                let file = word.trim_end_matches('.');
                assert!(root.join(file).exists(), "{page} names {file}, which does not exist");
                files += 1;
            }
        }
        for word in text
            .split("make ")
            .skip(1)
            .filter_map(|rest| rest.split(|c: char| !c.is_ascii_lowercase() && c != '-').next())
        {
            if text.contains(&format!("`make {word}`")) {
                assert!(
                    makefile.contains(&format!("\n{word}:")),
                    "{page} names `make {word}`, which the Makefile has not"
                );
                targets += 1;
            }
        }
        for word in text.split("`finetune-trainer ").skip(1).filter_map(|rest| rest.split([' ', '`']).next()) {
            assert!(
                help.contains(&format!("  {word} ")),
                "{page} names `finetune-trainer {word}`, which does not exist"
            );
            commands += 1;
        }
    }
    for (what, found) in [("links", links), ("files", files), ("make targets", targets), ("commands", commands)] {
        assert!(found > 5, "only {found} {what} were found");
    }
}
