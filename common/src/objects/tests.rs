//! Tests of a store in a folder.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use futures_util::TryStreamExt;
use uuid::Uuid;

use super::put::{PART_BYTES_MIN, PARTS_MAX, part_len};
use super::*;

fn open(folder: &Path) -> Objects {
    Objects::open(&config::Objects { url: Some(folder.display().to_string()), ..config::Objects::default() }).unwrap()
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}

fn parts(folder: &Path) -> usize {
    let is_part = |entry: &std::io::Result<std::fs::DirEntry>| {
        entry.as_ref().unwrap().path().extension() == Some("part".as_ref())
    };
    std::fs::read_dir(folder).unwrap().filter(is_part).count()
}

#[tokio::test]
async fn an_object_is_sent_once_and_verified_when_read() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(&dir.path().join("objects"));
    let large = vec![7; usize::try_from(PART_BYTES_MIN).unwrap() * 2 + 11];
    for bytes in [b"".as_slice(), b"small", &large] {
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        write(&source, bytes);
        let digest = Digest::of(bytes);
        let size = bytes.len() as u64;
        assert!(!objects.has(digest).await.unwrap());
        assert_eq!(objects.put_file(&source).await.unwrap(), Stored { digest, size, sent: true });
        assert_eq!(objects.put_file(&source).await.unwrap(), Stored { digest, size, sent: false });
        assert!(objects.has(digest).await.unwrap());

        assert_eq!(objects.get_bytes(digest, size).await.unwrap(), bytes);
        let reported = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&reported);
        let progress = move |n_bytes| {
            count.fetch_add(n_bytes, Ordering::Relaxed);
        };
        assert_eq!(objects.get_file(digest, &target, progress).await.unwrap(), size);
        assert_eq!((std::fs::read(&target).unwrap().as_slice(), reported.load(Ordering::Relaxed)), (bytes, size));
        assert_eq!(parts(dir.path()), 0);
        assert_eq!(std::fs::read(objects.local_path(digest).unwrap()).unwrap(), bytes);
        assert_eq!(objects.url(digest), format!("file://{}", objects.local_path(digest).unwrap().display()));
    }
    let digest = objects.put_bytes(b"small".to_vec()).await.unwrap();
    let hex = digest.to_string();
    assert!(objects.local_path(digest).unwrap().ends_with(format!("sha256/{}/{}", &hex[..2], &hex[2..])));

    let mut listed: Vec<Listed> = objects.list().try_collect().await.unwrap();
    listed.sort_by_key(|listed| listed.size);
    let sizes: Vec<u64> = listed.iter().map(|listed| listed.size).collect();
    assert_eq!(sizes, [0, 5, large.len() as u64]);
    assert!((Utc::now() - listed[0].at).num_seconds() < 600);
    objects.delete(digest).await.unwrap();
    objects.delete(digest).await.unwrap();
    assert!(!objects.has(digest).await.unwrap());
    assert!(matches!(objects.get_bytes(digest, 5).await, Err(Error::Absent { .. })));
}

#[tokio::test]
async fn owners_are_the_marked_databases_and_are_not_listed_as_objects() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(dir.path());
    assert!(objects.owners().await.unwrap().is_empty());
    let mut owners = [Uuid::new_v4(), Uuid::new_v4()];
    for owner in [owners[0], owners[1], owners[0]] {
        objects.add_owner(owner).await.unwrap();
        assert!(Path::new(objects.owner_url(owner).strip_prefix("file://").unwrap()).exists());
    }
    write(&dir.path().join("owners/README"), b"x");
    let mut found = objects.owners().await.unwrap();
    found.sort_unstable();
    owners.sort_unstable();
    assert_eq!(found, owners);
    assert!(objects.list().try_collect::<Vec<_>>().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_empty_store_lists_nothing_and_foreign_files_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(dir.path());
    assert!(objects.list().try_collect::<Vec<_>>().await.unwrap().is_empty());
    std::fs::create_dir_all(dir.path().join("sha256/ab")).unwrap();
    write(&dir.path().join("sha256/ab/cd"), b"x");
    write(&dir.path().join("sha256/notes.txt"), b"x");
    write(&dir.path().join("baton.db"), b"x");
    assert!(objects.list().try_collect::<Vec<_>>().await.unwrap().is_empty());
}

#[tokio::test]
async fn damage_is_detected_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(&dir.path().join("objects"));
    let digest = objects.put_bytes(b"content".to_vec()).await.unwrap();
    write(&objects.local_path(digest).unwrap(), b"CONTENT");
    assert!(matches!(objects.get_bytes(digest, 7).await, Err(Error::Damaged { .. })));
    let target = dir.path().join("target");
    assert!(matches!(objects.get_file(digest, &target, |_| ()).await, Err(Error::Damaged { .. })));
    assert!(!target.exists() && parts(dir.path()) == 0);
    // A truncated object is not taken for the whole one.
    write(&objects.local_path(digest).unwrap(), b"cont");
    assert_eq!(objects.put_bytes(b"content".to_vec()).await.unwrap(), digest);
    assert_eq!(objects.get_bytes(digest, 7).await.unwrap(), b"content");
    assert!(matches!(objects.get_bytes(digest, 6).await, Err(Error::TooLarge { size: 7, limit: 6, .. })));
}

#[tokio::test]
async fn an_old_object_is_young_again_after_another_put() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(dir.path());
    let digest = objects.put_bytes(b"content".to_vec()).await.unwrap();
    let path = objects.local_path(digest).unwrap();
    let two_days_ago = SystemTime::now() - Duration::from_secs(2 * 86_400);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(two_days_ago).unwrap();
    objects.put_bytes(b"content".to_vec()).await.unwrap();
    assert!(std::fs::metadata(&path).unwrap().modified().unwrap().elapsed().unwrap() < Duration::from_secs(600));
}

#[tokio::test]
async fn a_file_that_changes_or_is_absent_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(&dir.path().join("objects"));
    let path = dir.path().join("file");
    let size = PART_BYTES_MIN + 5;
    let bytes = vec![1; usize::try_from(size).unwrap()];
    write(&path, &bytes);
    let before = Digest::of(&bytes);
    // The file changes between the hash and the second read.
    let mut later = bytes.clone();
    later[3] = 2;
    write(&path, &later);
    assert!(matches!(objects.send_parts(&path, before, size).await, Err(Error::Changed { .. })));
    write(&path, &bytes[..100]);
    assert!(matches!(objects.send_parts(&path, before, size).await, Err(Error::Changed { .. })));
    assert!(!objects.has(before).await.unwrap());
    assert!(matches!(objects.put_file(&dir.path().join("absent")).await, Err(Error::File { .. })));
    assert!(matches!(objects.put_file(dir.path()).await, Err(Error::File { .. })));
}

#[tokio::test]
async fn concurrent_puts_of_one_object_succeed() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(dir.path());
    let puts = (0..32).map(|_| objects.put_bytes(vec![9; 100_000]));
    let digests = futures_util::future::try_join_all(puts).await.unwrap();
    assert_eq!(objects.get_bytes(digests[0], 100_000).await.unwrap(), vec![9; 100_000]);
    let n_files = std::fs::read_dir(objects.local_path(digests[0]).unwrap().parent().unwrap()).unwrap().count();
    assert_eq!(n_files, 1);
}

#[tokio::test]
async fn an_unusable_folder_is_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    write(&file, b"");
    let config = config::Objects { url: Some(file.join("below").display().to_string()), ..config::Objects::default() };
    let Err(error) = Objects::open(&config) else { panic!("a folder below a file") };
    assert!(error.to_string().contains("objects.url") && error.to_string().contains("below"), "{error}");

    let folder = dir.path().join("objects");
    let objects = open(&folder);
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o500)).unwrap();
    // The root user may write anyway.
    let is_refused = std::fs::write(folder.join("probe"), b"").is_err();
    let put = objects.put_bytes(b"x".to_vec()).await;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).unwrap();
    if is_refused {
        let error = put.unwrap_err();
        assert!(
            matches!(&error, Error::Folder { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied)
        );
    }
}

#[tokio::test]
async fn the_leftover_of_an_interrupted_put_is_skipped_and_removed_when_old() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(dir.path());
    assert_eq!(objects.remove_leftovers(Duration::ZERO).await.unwrap(), 0);
    let digest = objects.put_bytes(b"content".to_vec()).await.unwrap();
    let path = objects.local_path(digest).unwrap();
    let leftover = path.with_file_name(format!("{}#1", path.file_name().unwrap().display()));
    write(&leftover, b"cont");
    write(&path.with_file_name("notes#1"), b"");
    assert_eq!(objects.list().try_collect::<Vec<_>>().await.unwrap().len(), 1);
    assert_eq!(objects.remove_leftovers(Duration::from_secs(3600)).await.unwrap(), 0);
    assert_eq!(objects.remove_leftovers(Duration::ZERO).await.unwrap(), 1);
    assert!(!leftover.exists() && path.exists() && path.with_file_name("notes#1").exists());
}

#[tokio::test]
async fn a_symbolic_link_as_target_is_replaced_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let objects = open(&dir.path().join("objects"));
    let digest = objects.put_bytes(b"content".to_vec()).await.unwrap();
    let outside = dir.path().join("outside");
    write(&outside, b"mine");
    let target = dir.path().join("target");
    std::os::unix::fs::symlink(&outside, &target).unwrap();
    let own = Digest::of(&[b"target".as_slice(), digest.bytes()].concat()).to_string();
    let part = dir.path().join(format!(".baton-{}.part", &own[..16]));
    std::os::unix::fs::symlink(&outside, &part).unwrap();
    objects.get_file(digest, &target, |_| ()).await.unwrap();
    assert_eq!(
        (std::fs::read(&target).unwrap(), std::fs::read(&outside).unwrap()),
        (b"content".to_vec(), b"mine".to_vec())
    );
    assert!(!target.is_symlink() && !part.is_symlink());
}

#[test]
fn parts_respect_the_limits_of_number_and_size() {
    for size in [PART_BYTES_MIN, PART_BYTES_MIN + 1, 70 << 30, 5 << 40] {
        let len = part_len(size);
        assert!(len >= PART_BYTES_MIN && size.div_ceil(len) <= PARTS_MAX, "{size}");
    }
    assert_eq!(part_len(1 << 30), PART_BYTES_MIN);
}

#[test]
fn invalid_urls_are_rejected_with_the_remedy() {
    for (url, endpoint, expected) in [
        ("http://example.org/objects", None, "s3://BUCKET/PREFIX"),
        ("file://relative", None, "file:///FOLDER"),
        ("", None, "is empty"),
        ("s3://", None, "names no bucket"),
        ("s3:///prefix", None, "names no bucket"),
        ("s3://key:secret@bucket/x", None, "names no bucket"),
        ("s3://bucket/a//b", Some("https://s3.example.org"), "empty component"),
        ("s3://bucket", Some("https://key:secret@s3.example.org"), "AWS_ACCESS_KEY_ID"),
    ] {
        let config = config::Objects { url: Some(url.into()), endpoint: endpoint.map(str::to_owned), region: None };
        let Err(error) = Objects::open(&config) else { panic!("{url} was accepted") };
        assert!(error.to_string().contains(expected) && !error.to_string().contains("secret"), "{url}: {error}");
    }
}
