//! OpenSSH's `ProxyCommand`: a program whose standard input and output are the connection to a machine.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, Join, join};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Output, local};

/// Variables that the program inherits in addition to those of any command: credentials for another machine.
const INHERITED: [&str; 2] = ["SSH_AUTH_SOCK", "KRB5CCNAME"];

/// How long a program whose connection failed may take to exit.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Bytes of the end of its standard error that are kept.
const COMPLAINT_MAX: usize = 4 << 10;

/// The program in its own process group, which is killed on drop.
#[derive(Debug)]
pub(super) struct Proxy {
    child: Child,
    /// `None` once the program is reaped; until then the system cannot reuse its id.
    group: Option<Pid>,
    /// The end of its standard error.
    stderr: Arc<Mutex<Vec<u8>>>,
    /// The task that reads it.
    reading: JoinSet<()>,
}

impl Proxy {
    /// Starts the program by `/bin/sh`. (OpenSSH uses the user's shell, but service accounts have none.)
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

    /// The reason for the failure, if the program has ended.
    pub(super) async fn complaint(mut self) -> Option<String> {
        let status = timeout(END_LIMIT, self.child.wait()).await.ok()?.ok()?;
        self.group = None;
        // Its descendants may hold the pipe open.
        let _ = timeout(END_LIMIT, self.reading.join_next()).await;
        let stderr = std::mem::take(&mut *self.stderr.lock().unwrap_or_else(PoisonError::into_inner));
        let signal = local::signal_of(&status);
        let output = Output { exit: status.code(), signal, stdout: Vec::new(), stderr };
        Some(format!("its ProxyCommand has ended: {}", output.complaint()))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            // The group may be gone already.
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
