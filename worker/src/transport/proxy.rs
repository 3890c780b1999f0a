//! A program that leads to a machine: its input and its output are the connection (OpenSSH's `ProxyCommand`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, Join, join};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Output, local};

/// Variables that such a program sees beside those of any command: what it may log in with at another machine.
const INHERITED: [&str; 2] = ["SSH_AUTH_SOCK", "KRB5CCNAME"];

/// How long a program that leads no further may take to say why.
const END_LIMIT: Duration = Duration::from_secs(1);

/// The last bytes of its standard error that are kept.
const COMPLAINT_MAX: usize = 4 << 10;

/// The program, in a process group of its own, which is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Proxy {
    child: Child,
    /// Until the program is reaped; its number belongs to nobody else so long.
    group: Option<Pid>,
    /// The end of what it has written to its standard error.
    stderr: Arc<Mutex<Vec<u8>>>,
    /// What reads that.
    reading: JoinSet<()>,
}

impl Proxy {
    /// Starts it by `/bin/sh`. (OpenSSH takes the user's shell, and accounts of services have none.)
    pub(super) fn start(command: &str) -> std::io::Result<(Self, Join<ChildStdout, ChildStdin>)> {
        let mut shell = local::shell(&format!("exec {command}"));
        shell.envs(INHERITED.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value))));
        let mut child = shell.spawn()?;
        let group = local::group_of(&child);
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else { unreachable!("all three are piped") };
        let kept = Arc::default();
        let reading = JoinSet::from_iter([keep_end(stderr, Arc::clone(&kept))]);
        Ok((Self { child, group, stderr: kept, reading }, join(stdout, stdin)))
    }

    /// Why it leads nowhere, if it has ended.
    pub(super) async fn complaint(mut self) -> Option<String> {
        let status = timeout(END_LIMIT, self.child.wait()).await.ok()?.ok()?;
        self.group = None;
        // What it has left behind may hold the pipe open.
        let _ = timeout(END_LIMIT, self.reading.join_next()).await;
        let stderr = std::mem::take(&mut *self.stderr.lock().unwrap_or_else(PoisonError::into_inner));
        let signal = local::signal_of(&status);
        let output = Output { exit: status.code(), signal, stdout: Vec::new(), stderr };
        Some(format!("the ProxyCommand that leads there has ended: {}", output.complaint()))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            // It may be gone already.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn keep_end(mut stderr: ChildStderr, kept: Arc<Mutex<Vec<u8>>>) {
    let mut piece = BytesMut::with_capacity(COMPLAINT_MAX);
    while stderr.read_buf(&mut piece).await.is_ok_and(|count| count > 0) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(&piece);
        let n_over = kept.len().saturating_sub(COMPLAINT_MAX);
        kept.drain(..n_over);
        piece.clear();
    }
}
