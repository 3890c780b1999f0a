//! Fuzz tests of the readers: any input is read or rejected, quickly and with little memory.
//!
//! The inputs of each target are its corpus (`common/tests/fuzz/<target>`), random bytes, and the corpus with random
//! changes, which get further into a reader. `BATON_FUZZ_CASES=1000000` runs longer.

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};

use crate::message::{Control, Encoding, Reply, SIZE_BYTES_MAX, Task};
use crate::spec::{self, Format};
use crate::store::blob::{Checkpoint, Outcome};

/// Number of random inputs of each target.
const CASES: u32 = 500;

/// Time limit of one input. The slowest is 1 MiB of nested YAML, which takes some tenths of a second in an unoptimized
/// build.
const TIME_MAX: Duration = Duration::from_secs(20);

/// Most memory that a target may add to the process.
const MEMORY_KIB_MAX: u64 = 256 * 1024;

/// Runs a target. `read` fails by panicking.
pub(crate) fn run(target: &str, read: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    run_all(seeds.clone(), read);
    let changed = (select(seeds), vec((any::<Index>(), any::<u8>()), 0..8), any::<Option<Index>>());
    let changed = changed.prop_map(|(mut seed, changes, cut)| {
        for (at, byte) in changes {
            // No seed is empty.
            let at = at.index(seed.len());
            seed[at] = byte;
        }
        seed.truncate(cut.map_or(usize::MAX, |cut| cut.index(seed.len() + 1)));
        seed
    });
    let cases = std::env::var("BATON_FUZZ_CASES").map_or(CASES, |text| text.parse().unwrap());
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let inputs = prop_oneof![changed, vec(any::<u8>(), 0..1024)];
    let result = runner.run(&inputs, |input| {
        read(&input);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{target}: {error}");
    }
}

/// Runs a target over these inputs, within the limits of time and memory.
fn run_all(inputs: Vec<Vec<u8>>, read: fn(&[u8])) {
    let before_kib = peak_kib();
    for input in inputs {
        let begin = Instant::now();
        read(&input);
        assert!(begin.elapsed() < TIME_MAX, "{} bytes take {:?}", input.len(), begin.elapsed());
    }
    let added_kib = peak_kib() - before_kib;
    assert!(added_kib < MEMORY_KIB_MAX, "{added_kib} KiB more than before");
}

/// Peak memory of this process.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn read_message(body: &[u8]) {
    for encoding in [Encoding::MessagePack, Encoding::Json] {
        if let Ok(task) = Task::decode(body, encoding) {
            assert_eq!(Task::decode(&task.encode(encoding), encoding).unwrap().pid(), task.pid());
            if let Task::Launch { spec: Some(Ok(spec)), .. } = task {
                let _ = spec::from_json_value(spec).map(|spec| spec.digest());
            }
        }
        if let Ok(control) = Control::decode(body, encoding) {
            assert_eq!(Control::decode(&control.encode(encoding), encoding).unwrap(), control);
        }
        let _ = Reply::decode(body, encoding);
    }
}

fn read_document(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    for format in [Format::Yaml, Format::Json, Format::Toml] {
        match spec::parse(&text, format) {
            Ok(spec) => {
                assert_eq!(rmp_serde::from_slice::<spec::Spec>(&rmp_serde::to_vec_named(&spec).unwrap()).unwrap(), spec)
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

fn read_checkpoint(bytes: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::from_bytes(bytes) {
        assert!(Checkpoint::from_bytes(&checkpoint.to_bytes()).is_ok());
    }
    let _ = Outcome::from_bytes(bytes);
}

#[test]
fn any_bytes_as_a_message_are_handled() {
    run("message", read_message);
}

#[test]
fn any_bytes_as_a_document_are_handled() {
    run("document", read_document);
}

#[test]
fn any_bytes_as_a_checkpoint_are_handled() {
    run("checkpoint", read_checkpoint);
}

/// Nesting as deep as the size limit allows, which is too large for a corpus.
#[test]
fn the_deepest_nesting_that_fits_is_rejected() {
    let texts = ["[", "{\"a\":", "a: {", "- ", "a.", "[[a.", "&a [*a,", "\"", "'''", "|\n "];
    let of = |text: &str, n_bytes: usize| text.repeat(n_bytes / text.len()).into_bytes();
    run_all(texts.iter().map(|text| of(text, 1024 * 1024)).collect(), read_document);
    run_all(texts.iter().map(|text| of(text, SIZE_BYTES_MAX)).collect(), read_message);
    let bytes = [0x81, 0x91, 0xc7, 0xd9, 0xdd, 0xdf];
    run_all(bytes.iter().map(|byte| vec![*byte; SIZE_BYTES_MAX]).collect(), read_message);
    run_all(bytes.iter().map(|byte| [&[1], &vec![*byte; SIZE_BYTES_MAX][..]].concat()).collect(), read_checkpoint);
}
