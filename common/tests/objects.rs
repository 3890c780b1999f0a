//! The object store against a real S3 server, and against servers that misbehave.
//!
//! The server's address is in `BATON_TEST_S3`, and keys are in the environment; each test makes its own bucket.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_common::config;
use baton_common::digest::Digest;
use baton_common::id::Pid;
use baton_common::objects::{Entry, Error, Manifest, Objects};
use futures_util::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::aws::AmazonS3Builder;

fn endpoint() -> String {
    std::env::var("BATON_TEST_S3").expect("BATON_TEST_S3 is not set; run tests/run")
}

fn at(endpoint: &str, url: String) -> Objects {
    let region = Some("us-east-1".to_owned());
    Objects::open(&config::Objects { url: Some(url), endpoint: Some(endpoint.to_owned()), region }).unwrap()
}

fn new_bucket() -> String {
    let name = format!("b{}", Pid::generate());
    let endpoint = endpoint();
    let host = endpoint.trim_start_matches("http://");
    // The store's library cannot create buckets.
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "PUT /{name} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    name
}

/// Bytes that vary, so that parts in a wrong order are detected.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|idx| u8::try_from((idx / 7 + idx / 1_000_003) % 251).unwrap()).collect()
}

fn put(folder: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_bucket_keeps_small_and_large_files_and_sends_each_once() {
    let (bucket, dir) = (new_bucket(), tempfile::tempdir().unwrap());
    let objects = at(&endpoint(), format!("s3://{bucket}/some/prefix"));
    let other_prefix = at(&endpoint(), format!("s3://{bucket}"));
    for len in [0, 10, 8 << 20, (33 << 20) + 17] {
        let bytes = content(len);
        let (digest, source) = (Digest::of(&bytes), put(dir.path(), "source", &bytes));
        assert!(!objects.has(digest).await.unwrap());
        assert!(matches!(objects.get_bytes(digest, 1).await, Err(Error::Absent { .. })));
        let stored = objects.put_file(&source).await.unwrap();
        assert_eq!((stored.digest, stored.size, stored.sent), (digest, len as u64, true));
        assert!(!objects.put_file(&source).await.unwrap().sent);
        assert!(objects.has(digest).await.unwrap() && !other_prefix.has(digest).await.unwrap());

        assert_eq!(objects.get_bytes(digest, len as u64).await.unwrap(), bytes);
        let reported = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&reported);
        let progress = move |n_bytes| {
            count.fetch_add(n_bytes, Ordering::Relaxed);
        };
        let target = dir.path().join("target");
        assert_eq!(objects.get_file(digest, &target, progress).await.unwrap(), len as u64);
        assert!(std::fs::read(&target).unwrap() == bytes, "{len}");
        assert_eq!(reported.load(Ordering::Relaxed), len as u64);
        assert_eq!(objects.local_path(digest), None);
        let hex = digest.to_string();
        assert_eq!(objects.url(digest), format!("s3://{bucket}/some/prefix/sha256/{}/{}", &hex[..2], &hex[2..]));
    }
    let sizes = async |objects: &Objects| {
        let listed: Vec<_> = objects.list().try_collect().await.unwrap();
        let mut sizes: Vec<u64> = listed.iter().map(|listed| listed.size).collect();
        sizes.sort_unstable();
        sizes
    };
    assert_eq!(sizes(&objects).await, [0, 10, 8 << 20, (33 << 20) + 17]);
    assert!(sizes(&other_prefix).await.is_empty());
    let small = Digest::of(&content(10));
    objects.delete(small).await.unwrap();
    objects.delete(small).await.unwrap();
    assert!(!objects.has(small).await.unwrap());
    let only_these = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(only_these, 2, "no unfinished upload is left");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_listing_of_several_pages_is_complete_and_a_manifest_round_trips() {
    let objects = at(&endpoint(), format!("s3://{}/", new_bucket()));
    let puts = (0..1_100_u32).map(|n| {
        let objects = objects.clone();
        async move { objects.put_bytes(n.to_be_bytes().to_vec()).await }
    });
    let digests: Vec<Digest> =
        futures_util::StreamExt::buffered(futures_util::stream::iter(puts), 16).try_collect().await.unwrap();
    let entries = digests.iter().map(|digest| Entry {
        path: digest.to_string().into(),
        digest: *digest,
        size: 4,
        executable: false,
    });
    let manifest = Manifest::new(entries.collect()).unwrap();
    let name = objects.put_manifest(&manifest).await.unwrap();
    assert_eq!(objects.get_manifest(name).await.unwrap(), manifest);
    assert!(matches!(objects.get_manifest(digests[0]).await, Err(Error::Manifest { .. })));
    assert_eq!(objects.list().try_collect::<Vec<_>>().await.unwrap().len(), 1_101);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn damage_in_a_bucket_is_detected_and_leaves_no_file() {
    let (bucket, dir) = (new_bucket(), tempfile::tempdir().unwrap());
    let objects = at(&endpoint(), format!("s3://{bucket}"));
    let digest = objects.put_bytes(content(3 << 20)).await.unwrap();
    let hex = digest.to_string();
    let raw = AmazonS3Builder::from_env().with_bucket_name(&bucket).with_endpoint(endpoint()).with_allow_http(true);
    let key = format!("sha256/{}/{}", &hex[..2], &hex[2..]);
    raw.build().unwrap().put(&key.into(), vec![1; 3 << 20].into()).await.unwrap();
    assert!(matches!(objects.get_bytes(digest, 3 << 20).await, Err(Error::Damaged { .. })));
    assert!(matches!(objects.get_file(digest, &dir.path().join("x"), |_| ()).await, Err(Error::Damaged { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn an_absent_bucket_is_named() {
    let objects = at(&endpoint(), "s3://nobody-made-this".to_owned());
    let dir = tempfile::tempdir().unwrap();
    let large = put(dir.path(), "large", &content(9 << 20));
    let errors = [
        objects.put_bytes(vec![1]).await.unwrap_err(),
        objects.put_file(&large).await.unwrap_err(),
        objects.get_bytes(Digest::of(b""), 1).await.unwrap_err(),
        objects.list().try_collect::<Vec<_>>().await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(&error, Error::NoBucket { bucket } if bucket == "nobody-made-this"), "{error:?}");
        assert!(error.to_string().contains("create it"), "{error}");
    }
}

/// A server with this answer to every request, until the test ends.
fn answers(status: &'static str, body: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            );
        }
    });
    format!("http://{address}")
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn wrong_keys_and_silent_servers_are_distinguished_without_secrets() {
    let secret = std::env::var("AWS_SECRET_ACCESS_KEY").unwrap();
    let refusal = "<?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><StringToSign>AWS4 s3cret</StringToSign></Error>";
    let refused = at(&answers("403 Forbidden", refusal), "s3://bucket".into()).get_bytes(Digest::of(b""), 1).await;
    let refused = refused.unwrap_err();
    assert!(matches!(&refused, Error::Refused { code, .. } if code == "SignatureDoesNotMatch"), "{refused:?}");
    assert!(refused.to_string().contains("AWS_ACCESS_KEY_ID") && !refused.is_transient(), "{refused}");
    // The response to a HEAD request has no body with a code.
    let silent = at(&answers("403 Forbidden", ""), "s3://bucket".into()).has(Digest::of(b"")).await.unwrap_err();
    assert!(matches!(&silent, Error::Refused { code, .. } if code == "Forbidden"), "{silent:?}");

    let begun = Instant::now();
    let broken =
        at(&answers("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>"), "s3://bucket".into());
    let broken = broken.put_bytes(vec![1]).await.unwrap_err();
    let unreachable = at("http://127.0.0.1:9", "s3://bucket".into()).put_bytes(vec![1]).await.unwrap_err();
    for error in [&broken, &unreachable] {
        assert!(matches!(error, Error::Unreachable { .. }) && error.is_transient(), "{error:?}");
    }
    assert!(unreachable.to_string().contains("Connection refused"), "{unreachable}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    for error in [&refused, &silent, &broken, &unreachable] {
        assert!(!error.to_string().contains(&secret), "{error}");
        assert!(!format!("{error:?}").contains(&secret), "{error:?}");
    }
}
