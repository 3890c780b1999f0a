//! The traces of many local programs in the process that launched them. A separate test binary, since it counts resources
//! of the whole process.

#![expect(clippy::unwrap_used, reason = "the functions that the tests share are tests too")]

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use baton_common::id::Pid;
use baton_worker::internals::{Command, Program, Programs, Sandbox};
use tokio::sync::watch;

const N_PROGRAMS: usize = 100;

#[tokio::test]
async fn a_hundred_programs_leave_no_zombie_and_no_open_file() {
    let (_lease_tx, lease) = watch::channel(0);
    let programs = Programs::start(env!("CARGO_BIN_EXE_baton-worker").into(), lease, Duration::from_secs(600)).unwrap();
    let root = tempfile::TempDir::new().unwrap();
    let launch = |idx: usize| {
        let sandbox = Sandbox::create(root.path(), Pid::generate(), 1, 1).unwrap();
        let argv =
            if idx.is_multiple_of(10) { vec!["no-such-program"] } else { vec!["sh", "-c", "sleep 1000 & exit 0"] };
        let command = Command::Run(argv.into_iter().map(str::to_owned).collect());
        let grace = Duration::from_secs(1);
        programs.launch(Program { command, vars: BTreeMap::new(), stdin: None, time_limit: None, grace, sandbox })
    };
    // The first program opens the files that the runtime keeps open.
    launch(0).await.unwrap().wait().await.unwrap();
    let n_open = n_open_files();

    for idx in 0..N_PROGRAMS {
        let mut running = launch(idx).await.unwrap();
        match idx % 3 {
            0 => running.terminate().await.unwrap(),
            1 => running.kill().await.unwrap(),
            _ => running.wait().await.unwrap(),
        };
    }
    // Only the thread waits for programs whose handles were dropped.
    for idx in 0..5 {
        drop(launch(idx).await.unwrap());
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !children().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "children are left: {:?}", children());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(n_open_files(), n_open);
    programs.stop().await;
}

fn n_open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The stat lines of this process's children, zombies included.
fn children() -> Vec<String> {
    let own = std::process::id().to_string();
    let stats = fs::read_dir("/proc").unwrap().flatten();
    let stats = stats.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    let parent = |stat: &str| stat.rsplit_once(')')?.1.split_whitespace().nth(1).map(str::to_owned);
    stats.filter(|stat| parent(stat).as_deref() == Some(&*own)).collect()
}
