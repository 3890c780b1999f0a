//! Stored data stays readable. The files are never regenerated: a change that breaks one of these tests needs a new
//! version byte, a reader for the old version, and new files.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::Path;

use baton_common::digest::Digest;
use baton_common::spec::{self, Format, Spec};
use baton_common::store::blob::{self, Checkpoint, Outcome, Progress};

fn golden(name: &str, bytes_now: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    // Only for the first file of a new version: BATON_GOLDEN=write.
    if std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") && !path.exists() {
        std::fs::write(&path, bytes_now).unwrap();
    }
    std::fs::read(path).unwrap()
}

#[test]
fn a_checkpoint_of_version_1_is_read() {
    let checkpoint = Checkpoint {
        advances: 41,
        idle_advances: 3,
        failures: 2,
        last_error: Some("exit 1".into()),
        values: [("energy".to_owned(), serde_json::json!(-7.25))].into_iter().collect(),
        progress: Some(Progress { done: 41, total: Some(50) }),
        state: vec![0x81, 0xa4, b'd', b'o', b'n', b'e', 41],
    };
    assert_eq!(Checkpoint::from_bytes(&golden("checkpoint.v1", &checkpoint.to_bytes())).unwrap(), checkpoint);
}

#[test]
fn an_outcome_of_version_1_is_read() {
    let outcome = Outcome {
        exit: Some(137),
        signal: Some(9),
        values: [("files".to_owned(), serde_json::json!(["a", "b"]))].into_iter().collect(),
        ok: false,
        reason: Some("killed by ann@host: enough".into()),
        sandbox: Some("host:/var/lib/baton/sandbox/1".into()),
        results: None,
    };
    assert_eq!(Outcome::from_bytes(&golden("outcome.v1", &outcome.to_bytes())).unwrap(), outcome);
}

#[test]
fn an_outcome_with_results_is_read() {
    let outcome = Outcome { exit: Some(0), ok: true, results: Some(Digest::of(b"manifest")), ..Outcome::default() };
    assert_eq!(Outcome::from_bytes(&golden("outcome-results.v1", &outcome.to_bytes())).unwrap(), outcome);
}

fn written(document: &str) -> Spec {
    spec::parse(document, Format::Yaml).unwrap()
}

#[test]
fn a_spec_of_version_1_is_read() {
    let spec =
        written("{run: [echo, hello], vars: {A: b}, labels: {c: d}, retry: {max: 3}, needs: {time: 2h}, stdin: x}");
    assert_eq!(blob::spec_from_bytes(&golden("spec.v1", &blob::spec_to_bytes(&spec))).unwrap(), spec);
}

#[test]
fn a_spec_of_version_2_is_read() {
    let mut spec = written(
        r#"{run: [pw.x], at: cluster, session: si, native: {account: s1}, pre: [module load qe], values: result.json,
            needs: {nodes: 2, ranks: 8, cpus: 4, mem: 32GiB, gpus: 1, time: 2h},
            in: [{from: "resource://Si.upf", how: link}, {from: "session://a.tgz", how: unpack, optional: true}],
            out: [relax.out, {from: "*.chk", to: "session://chk/", how: move, when: always, optional: true}]}"#,
    );
    spec.on_site.as_mut().unwrap().staged = Some(Digest::of(b"manifest"));
    let bytes = golden("spec.v2", &blob::spec_to_bytes(&spec));
    assert_eq!((bytes[0], blob::spec_from_bytes(&bytes).unwrap()), (2, spec));
}

#[test]
fn a_spec_of_version_3_is_read() {
    let mut spec = written("{run: [pw.x], at: cluster}");
    let on_site = spec.on_site.as_mut().unwrap();
    (on_site.staged, on_site.staged_version) = (Some(Digest::of(b"manifest")), 2);
    let bytes = golden("spec.v3", &blob::spec_to_bytes(&spec));
    assert_eq!((bytes[0], blob::spec_from_bytes(&bytes).unwrap()), (3, spec));
}
