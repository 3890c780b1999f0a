//! A private Slurm behind a private OpenSSH server, as a site of a scene; a test may break both.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::eventually;
use crate::process::Worker;
use crate::scene::{Output, Scene};
use crate::services::folder;
use crate::sshd::Sshd;

/// Commands that a test may replace, as found over SSH.
const COMMANDS: [&str; 6] = ["sbatch", "squeue", "sacct", "scancel", "timeout", "cat"];

/// A login node with Slurm behind it: the site `cluster`. Stopped on drop.
pub struct Slurm {
    folder: tempfile::TempDir,
    /// Its login node.
    pub sshd: Sshd,
    config: PathBuf,
    extra: String,
}

impl Slurm {
    /// Starts it. `site` and `ssh` are additional lines of the sections `[sites.cluster]` and `[ssh.login]`; `sshd`
    /// holds additional lines of the server's configuration.
    pub fn start(scene: &Scene, site: &str, ssh: &str, sshd: &str) -> Self {
        let folder = folder("baton-slurm-");
        let bin = folder.path().join("bin");
        std::fs::create_dir_all(&bin).expect("own folder");
        run(folder.path(), &["start"]);
        // Only the first line of `SetEnv` counts, so it has all variables.
        let extra = format!(
            "SetEnv SHLVL=5 SLURM_CONF={} PATH={}:/usr/local/bin:/usr/bin:/bin;{sshd}",
            folder.path().join("slurm.conf").display(),
            bin.display()
        );
        let sshd = Sshd::with(&extra);
        let slurm = Self { config: scene.path("baton.toml"), folder, sshd, extra };
        slurm.configure(scene, slurm.sshd.address().as_str(), site, ssh);
        slurm
    }

    /// Writes the configuration, with this address of the login node.
    pub fn configure(&self, scene: &Scene, address: &str, site: &str, ssh: &str) {
        let (host, port) = address.rsplit_once(':').expect("host:port");
        self.sshd.know(&format!("[{host}]:{port}"), "host_ed25519.pub");
        let text = format!(
            "objects.url = '{objects}'
             [sites.cluster]
             transport = {{ssh = 'login'}}
             launcher = 'slurm'
             root = '{root}'
             poll = '1s'
             {site}
             [sites.plain]
             transport = {{ssh = 'login'}}
             launcher = 'fork'
             root = '{root}'
             poll = '1s'
             {site}
             [ssh.login]
             host = '{host}'
             port = {port}
             key = '{key}'
             known_hosts = '{known}'
             config = '/dev/null'
             {ssh}",
            objects = scene.path("objects").display(),
            root = scene.path("site").display(),
            key = self.sshd.file("id_ed25519").display(),
            known = self.sshd.file("known_hosts").display(),
        );
        std::fs::write(&self.config, text).expect("own folder");
    }

    /// Starts a worker that serves the site, and waits until it is ready.
    pub async fn worker(&self, scene: &Scene, name: &str, variables: &[(&str, &str)]) -> Worker {
        let config = self.config.display().to_string();
        let variables = [&[("BATON_CONFIG", config.as_str())], variables].concat();
        let worker = scene.worker_with(&variables, name, &[]);
        worker.ready().await;
        worker
    }

    /// Starts a worker from another program.
    pub async fn worker_of(&self, scene: &Scene, program: &str, name: &str, arguments: &[&str]) -> Worker {
        let config = self.config.display().to_string();
        scene.worker_of(program, name, &[&["--config", &config], arguments].concat()).await
    }

    /// Returns what `squeue` lists for these states, `%i %j %T` on each line.
    pub fn jobs(&self, states: &str) -> Vec<String> {
        let mut command = Command::new("squeue");
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf")).args(["-h", "-t", states, "-o", "%i %j %T"]);
        let output = command.output().expect("Slurm is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// Waits until there are no jobs.
    pub async fn is_empty(&self) {
        eventually("Slurm has no job", Duration::from_secs(60), async || {
            let jobs = self.jobs("PENDING,RUNNING,COMPLETING,SUSPENDED");
            if jobs.is_empty() { Ok(()) } else { Err(jobs) }
        })
        .await;
    }

    /// Replaces a command, as found over SSH, with a shell script; in it, `$REAL` is the real command.
    pub fn replace(&self, command: &str, script: &str) {
        assert!(COMMANDS.contains(&command), "{command} cannot be replaced");
        let path = self.folder.path().join("bin").join(command);
        let part = path.with_extension("part");
        std::fs::write(&part, format!("#!/bin/sh\nREAL=/usr/bin/{command}\n{script}\n")).expect("own folder");
        std::fs::set_permissions(&part, std::fs::Permissions::from_mode(0o755)).expect("own file");
        std::fs::rename(&part, &path).expect("own folder");
    }

    /// Restores a replaced command.
    pub fn mend(&self, command: &str) {
        std::fs::remove_file(self.folder.path().join("bin").join(command)).expect("it was replaced");
    }

    /// Returns a file of its folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the killed login node again.
    pub fn start_login(&self) {
        self.sshd.start_again(&self.extra);
    }

    /// Takes down its node and the running job, which Slurm requeues.
    pub fn lose_node(&self) {
        let mut command = Command::new("scontrol");
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf"));
        command.args(["update", "nodename=n1", "state=down", "reason=test"]);
        assert!(command.status().expect("Slurm is installed").success());
    }

    /// Requeues all jobs, regardless of their settings.
    pub fn requeue_all(&self) {
        let ids = self.jobs("RUNNING").into_iter().filter_map(|line| line.split(' ').next().map(str::to_owned));
        for id in ids {
            for arguments in [["update", &format!("jobid={id}"), "requeue=1"].as_slice(), &["requeue", &id]] {
                let mut command = Command::new("scontrol");
                command.env("SLURM_CONF", self.folder.path().join("slurm.conf")).args(arguments);
                assert!(command.status().expect("Slurm is installed").success());
            }
        }
    }

    /// Stops its controller; jobs continue to run.
    pub fn stop_controller(&self) {
        run(self.folder.path(), &["stop-controller"]);
    }

    /// Starts the controller again with the jobs that it had.
    pub fn start_controller(&self) {
        run(self.folder.path(), &["start-controller"]);
    }

    /// Runs a CLI command with the site's configuration.
    pub async fn baton(&self, scene: &Scene, arguments: &[&str]) -> Output {
        let config = self.config.display().to_string();
        scene.baton_in(scene.folder(), &[("BATON_CONFIG", &config)], arguments).await
    }

    /// Submits a spec and returns the pids.
    pub async fn submit(&self, scene: &Scene, text: &str, count: u32) -> Vec<String> {
        let spec = scene.spec(&format!("{}.yaml", uuid::Uuid::now_v7().simple()), text);
        let (spec, count) = (spec.display().to_string(), count.to_string());
        let output = self.baton(scene, &["submit", &spec, "--count", &count, "-o", "ids"]).await.ok();
        output.stdout.lines().map(str::to_owned).collect()
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        run(self.folder.path(), &["stop"]);
    }
}

fn run(folder: &Path, arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("services/slurm.sh");
    let status =
        Command::new(script).arg(arguments[0]).arg(folder).args(&arguments[1..]).env("SLURM_CPUS", "64").status();
    assert!(status.expect("the script exists").success(), "slurm.sh {}", arguments[0]);
}
