//! Workers whose machine lacks a resource: no process pays for it, the worker is named, and it recovers by itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use baton_common::state::State;
use baton_tests::eventually;
use baton_tests::process::Worker;
use baton_tests::scene::Scene;
use baton_tests::services::programs;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::Value;

/// A shortage must be noticed within this time.
const NAMED: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(120);
const COUNT: u32 = 200;

/// A small file system that is unmounted at the end.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(path: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        assert!(
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&path).status().unwrap().success()
        );
        Self(path)
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }

    /// Uses up all space or all inodes.
    fn fill(&self, what: &str) {
        let script = match what {
            "disk space" => "head -c 100000000 /dev/zero > \"$0/filler\"",
            _ => "mkdir \"$0/fillers\" && i=0; while : > \"$0/fillers/$i\"; do i=$((i + 1)); done",
        };
        // It ends with the error.
        drop(Command::new("sh").args(["-c", script]).arg(&self.0).output().unwrap());
    }

    fn empty(&self) {
        let _ = fs::remove_file(self.0.join("filler"));
        let _ = fs::remove_dir_all(self.0.join("fillers"));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

async fn is_named(scene: &Scene, worker: &str, lacks: &str) {
    eventually(&format!("{worker} is named"), NAMED, async || {
        let doctor = scene.baton(&["doctor"]).await;
        let workers = scene.baton(&["workers", "-o", "json"]).await.json();
        let row = workers.as_array().unwrap().iter().find(|row| row["name"] == worker).unwrap().clone();
        let table = scene.baton(&["workers"]).await.stdout;
        let is_named = doctor.stdout.contains(&format!("{worker} on"))
            && doctor.stdout.contains(&format!("lacks {lacks}"))
            && doctor.code == 1
            && row["lacks"]["what"] == lacks
            && table.contains(&format!("lacks {lacks}"));
        if is_named { Ok(()) } else { Err((doctor, row, table)) }
    })
    .await;
}

async fn is_well(scene: &Scene, worker: &str) {
    eventually(&format!("{worker} has recovered"), Duration::from_secs(30), async || {
        let workers = scene.baton(&["workers", worker, "-o", "json"]).await.json();
        if workers[0]["lacks"] == Value::Null { Ok(()) } else { Err(workers) }
    })
    .await;
}

/// Waits until all have finished, and checks that none was charged.
async fn all_finish(scene: &Scene, count: u32) {
    eventually("all have finished", LIMIT, async || {
        let n_finished = scene.count(&format!("state = {}", State::Finished.code())).await;
        if n_finished == u64::from(count) { Ok(()) } else { Err((n_finished, scene.baton(&["list"]).await.stdout)) }
    })
    .await;
    assert_eq!(scene.count("try > 1").await, 0);
    let listed = scene.baton(&["list", "-n", "0", "-o", "json"]).await.ok().json();
    let failed: Vec<&Value> = listed.as_array().unwrap().iter().filter(|process| process["exit"] != 0).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(scene.sql("SELECT count(*) FROM attempt WHERE how = 'error'").await.trim(), "0");
}

async fn attempts_of(scene: &Scene, worker: &str) -> u64 {
    scene.sql(&format!("SELECT count(*) FROM attempt WHERE worker_name = '{worker}'")).await.trim().parse().unwrap()
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_without_disk_inodes_or_the_right_to_write_leaves_all_to_the_healthy_one() {
    let scene = Scene::new().await;
    let mut count = 0;
    for (what, options) in
        [("disk space", "size=8m"), ("inodes", "size=64m,nr_inodes=400"), ("a writable disk", "size=8m")]
    {
        let name = format!("sick-{}", what.split(' ').next().unwrap());
        let mount = Mount::tmpfs(scene.path(&format!("disk-{name}")), options);
        let root = mount.0.display().to_string();
        let mut sick = scene.worker(&name, &["--slots", "20", "--root", &root]).await;
        let mut healthy = scene.worker("healthy", &["--slots", "20"]).await;
        scene.submit("script: sleep 0.05", COUNT / 2).await;
        if what == "a writable disk" {
            // Not while a program writes there.
            all_finish(&scene, count + COUNT / 2).await;
            mount.remount("ro");
        } else {
            mount.fill(what);
        }
        scene.submit("run: ['true']", COUNT / 2).await;
        count += COUNT;
        is_named(&scene, &name, what).await;
        all_finish(&scene, count).await;
        let n_attempts = attempts_of(&scene, &name).await;
        scene.submit("run: ['true']", 20).await;
        count += 20;
        all_finish(&scene, count).await;
        assert_eq!(attempts_of(&scene, &name).await, n_attempts, "the worker takes nothing");

        // Without the healthy worker they stay queued, and the reason is shown.
        healthy.terminate().await;
        let pid = scene.submit("run: ['true']", 1).await.remove(0);
        count += 1;
        let explained = scene.baton(&["explain", &pid, "-o", "json"]).await.ok().json()[0].clone();
        assert_eq!(explained["condition"], "workers_lack", "{explained}");
        assert!(explained["text"].as_str().unwrap().contains(what), "{explained}");
        if what == "a writable disk" {
            mount.remount("rw")
        } else {
            mount.empty()
        }
        is_well(&scene, &name).await;
        all_finish(&scene, count).await;
        sick.terminate().await;
    }
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_whose_root_cannot_be_used_is_named_before_it_takes_anything() {
    let scene = Scene::new().await;
    fs::write(scene.path("file"), "").unwrap();
    let root = scene.path("file/root").display().to_string();
    let sick = scene.worker("sick", &["--root", &root]).await;
    sick.says("lacks a usable root").await;
    let pids = scene.submit("run: ['true']", 3).await;
    is_named(&scene, "sick", "a usable root").await;
    assert_eq!(attempts_of(&scene, "sick").await, 0);
    fs::remove_file(scene.path("file")).unwrap();
    all_finish(&scene, u32::try_from(pids.len()).unwrap()).await;
}

/// A worker of an unprivileged user with a process limit.
fn short_of_processes(scene: &Scene, name: &str, limit: u32, uid: u32) -> PathBuf {
    let program = scene.path(&format!("{name}-worker"));
    fs::copy(programs().join("baton-worker"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let script = format!(
        "#!/bin/bash\nchown -R {uid} root home tmp\nulimit -u {limit}\n\
         exec setpriv --reuid {uid} --regid {uid} --clear-groups {} \"$@\"\n",
        program.display()
    );
    let wrapper = scene.path(&format!("{name}.sh"));
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let mut folder: &Path = scene.folder();
    // If its folders are private, the user cannot start its program.
    while let Some(parent) = folder.parent() {
        let mode = fs::metadata(folder).unwrap().permissions().mode();
        assert!(mode & 0o001 != 0, "{} cannot be entered", folder.display());
        folder = parent;
    }
    wrapper
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_that_is_short_of_processes_excepts_none() {
    let scene = Scene::new().await;
    let wrapper = short_of_processes(&scene, "few", 60, 60_111);
    let worker = scene.worker_of(wrapper.to_str().unwrap(), "few", &["--slots", "30"]).await;
    scene.submit("run: [sleep, '1']", 60).await;
    worker.says("lacks processes").await;
    all_finish(&scene, 60).await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_without_open_files_leaves_all_to_the_healthy_one_and_comes_back() {
    let scene = Scene::new().await;
    let sick = scene.worker("sick", &["--slots", "20"]).await;
    sick.ready().await;
    let pid = Pid::from_raw(sick.os_pid().cast_signed());
    let maximum = getrlimit(Resource::Nofile).maximum;
    let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(4), maximum }).unwrap();
    is_named(&scene, "sick", "open files").await;
    let _healthy = scene.worker("healthy", &["--slots", "20"]).await;
    scene.submit("run: ['true']", COUNT).await;
    all_finish(&scene, COUNT).await;
    assert_eq!(attempts_of(&scene, "sick").await, 0);
    prlimit(pid, Resource::Nofile, before).unwrap();
    is_well(&scene, "sick").await;
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_without_memory_is_named_and_comes_back() {
    let scene = Scene::new().await;
    let sick = scene.worker("sick", &["--slots", "20"]).await;
    sick.ready().await;
    let pid = Pid::from_raw(sick.os_pid().cast_signed());
    let limit = |current| Rlimit { current, maximum: None };
    prlimit(pid, Resource::As, limit(Some(16 << 20))).unwrap();
    is_named(&scene, "sick", "memory").await;
    let _healthy = scene.worker("healthy", &["--slots", "20"]).await;
    scene.submit("run: ['true']", COUNT).await;
    all_finish(&scene, COUNT).await;
    prlimit(pid, Resource::As, limit(None)).unwrap();
    is_well(&scene, "sick").await;
}

/// A library that makes every fsync of a program take five seconds.
fn slow_fsync(scene: &Scene) -> PathBuf {
    let (source, library) = (scene.path("slow.c"), scene.path("slow.so"));
    fs::write(&source, "#include <unistd.h>\nint fsync(int fd) { sleep(5); return fdatasync(fd); }\n").unwrap();
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(compiled.success());
    library
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_worker_on_a_slow_disk_is_named_keeps_its_lease_and_finishes_its_processes() {
    let scene = Scene::new().await;
    let library = slow_fsync(&scene);
    let slow: Worker = scene.worker_with(&[("LD_PRELOAD", library.to_str().unwrap())], "slow", &["--slots", "20"]);
    slow.ready().await;
    is_named(&scene, "slow", "a fast disk").await;
    scene.submit("run: ['true']", 40).await;
    all_finish(&scene, 40).await;
    assert_eq!(scene.sql("SELECT count(*) FROM attempt WHERE how = 'lost'").await.trim(), "0");
}
