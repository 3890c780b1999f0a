//! What version 1 has written stays readable. The files are never made anew: a change that breaks one of these tests
//! needs a new version byte, a reader for the old one, and files of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::Path;

use baton_common::store::blob::{Checkpoint, Outcome, Progress};

fn golden(name: &str, bytes_now: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    // Only for a new version's first file: BATON_GOLDEN=write.
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
    };
    assert_eq!(Outcome::from_bytes(&golden("outcome.v1", &outcome.to_bytes())).unwrap(), outcome);
}
