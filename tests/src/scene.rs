//! The part of the services that one test uses.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::amqp::Amqp;
use crate::eventually;
use crate::process::{Worker, clean_environment};
use crate::services::{Services, folder, programs};

/// The time limit of a CLI command.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// A virtual host, a schema and a folder, removed on drop unless the test fails.
pub struct Scene {
    services: Services,
    name: String,
    folder: tempfile::TempDir,
}

/// The output of a CLI command.
#[derive(Debug)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Scene {
    /// Creates a scene on the shared services.
    pub async fn new() -> Self {
        Self::on(Services::shared()).await
    }

    /// Creates a scene on private services, which the test may break.
    pub async fn private() -> Self {
        let services = tokio::task::spawn_blocking(Services::private).await.expect("no panic");
        Self::on(services).await
    }

    /// Creates a scene on private services whose database has a disk of this size.
    pub async fn on_small_disk(megabytes: u32) -> Self {
        let services = tokio::task::spawn_blocking(move || Services::on_small_disk(megabytes)).await.expect("no panic");
        Self::on(services).await
    }

    /// Creates a scene on private services with a broker of three nodes.
    pub async fn cluster() -> Self {
        let services = tokio::task::spawn_blocking(Services::cluster).await.expect("no panic");
        Self::on(services).await
    }

    async fn on(services: Services) -> Self {
        let id = uuid::Uuid::now_v7().simple().to_string();
        let scene = Self { services, name: format!("t{id}"), folder: folder("baton-test-") };
        scene.make_vhost().await;
        scene.psql(&scene.services.database, &format!("CREATE SCHEMA {}", scene.name)).await;
        scene
    }

    /// Creates the virtual host; needed again after the broker was restarted empty.
    pub async fn make_vhost(&self) {
        self.manage("PUT", &format!("vhosts/{}", self.name), "").await;
        let rights = r#"{"configure": ".*", "write": ".*", "read": ".*"}"#;
        self.manage("PUT", &format!("permissions/{}/guest", self.name), rights).await;
    }

    /// The services of the scene.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// The virtual host's URL, with a short heartbeat; for a cluster the URLs of all nodes.
    pub fn broker_url(&self) -> String {
        self.broker_urls().join(",")
    }

    /// The virtual host's URL at each node.
    pub fn broker_urls(&self) -> Vec<String> {
        self.services.amqp.iter().map(|amqp| format!("{amqp}/{}?heartbeat=10", self.name)).collect()
    }

    /// The schema's URL.
    pub fn database_url(&self) -> String {
        format!("{}?options=-csearch_path%3D{}", self.services.database, self.name)
    }

    /// The folder of the test.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in that folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a spec into the folder.
    pub fn spec(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).expect("own folder");
        path
    }

    /// Starts a worker and waits until it is ready.
    pub async fn worker(&self, name: &str, arguments: &[&str]) -> Worker {
        self.worker_of("baton-worker", name, arguments).await
    }

    /// Starts a worker from another program, and waits until it is ready.
    pub async fn worker_of(&self, program: &str, name: &str, arguments: &[&str]) -> Worker {
        let worker = Worker::start(self, &programs().join(program), &[], name, arguments);
        worker.ready().await;
        worker
    }

    /// Starts a worker from another program, without waiting until it is ready.
    pub fn start_of(&self, program: &str, name: &str, arguments: &[&str]) -> Worker {
        Worker::start(self, &programs().join(program), &[], name, arguments)
    }

    /// Starts a worker with additional environment variables, without waiting until it is ready.
    pub fn worker_with(&self, variables: &[(&str, &str)], name: &str, arguments: &[&str]) -> Worker {
        Worker::start(self, &programs().join("baton-worker"), variables, name, arguments)
    }

    /// Runs a CLI command.
    pub async fn baton(&self, arguments: &[&str]) -> Output {
        self.baton_in(self.folder(), &[], arguments).await
    }

    /// Runs a CLI command in a folder, with additional environment variables.
    pub async fn baton_in(&self, folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        output(self.command_in(folder, variables, arguments)).await
    }

    /// Runs a command of another CLI program.
    pub async fn baton_of(&self, program: &Path, arguments: &[&str]) -> Output {
        output(self.command_of(program, self.folder(), &[], arguments)).await
    }

    /// Returns a CLI command that is not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_in(self.folder(), &[], arguments)
    }

    fn command_in(&self, folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Command {
        self.command_of(Path::new("baton"), folder, variables, arguments)
    }

    fn command_of(&self, program: &Path, folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Command {
        let mut command = Command::new(programs().join(program));
        clean_environment(&mut command);
        command
            .args(arguments)
            .current_dir(folder)
            .env("BATON_BROKER_URL", self.broker_url())
            .env("BATON_DATABASE_URL", self.database_url())
            .env("HOME", folder)
            .env("USER", "tester")
            .envs(variables.iter().copied())
            .stdin(Stdio::null());
        command
    }

    /// Submits a spec and returns the pids.
    pub async fn submit(&self, text: &str, count: u32) -> Vec<String> {
        let spec = self.spec(&format!("{}.yaml", uuid::Uuid::now_v7().simple()), text);
        let count = count.to_string();
        let output = self.baton(&["submit", &spec.display().to_string(), "--count", &count, "-o", "ids"]).await.ok();
        output.stdout.lines().map(str::to_owned).collect()
    }

    /// Returns everything about a process.
    pub async fn show(&self, pid: &str) -> Value {
        self.baton(&["show", pid, "-o", "json"]).await.ok().json()[0].clone()
    }

    /// Returns the number of processes in each state, from the database, which is quicker than a command.
    pub async fn count(&self, condition: &str) -> u64 {
        let text = self.sql(&format!("SELECT count(*) FROM process WHERE {condition}")).await;
        text.trim().parse().expect("a count")
    }

    /// Runs SQL in the schema; each row is a line, with columns separated by `|`.
    pub async fn sql(&self, sql: &str) -> String {
        self.psql(&self.database_url(), sql).await
    }

    async fn psql(&self, url: &str, sql: &str) -> String {
        let output = Command::new("psql").args([url, "-qtAc", sql]).output().await.expect("psql is installed");
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Sends a request to the management API.
    pub async fn manage(&self, method: &str, path: &str, body: &str) -> String {
        self.manage_at(1, method, path, body).await
    }

    /// Sends a request to the management API of a node, counted from 1.
    pub async fn manage_at(&self, node: usize, method: &str, path: &str, body: &str) -> String {
        let url = format!("{}/api/{path}", self.services.management[node - 1]);
        let output = Command::new("curl")
            .args([
                "-sS",
                "--fail-with-body",
                "--retry",
                "20",
                "--retry-connrefused",
                "-u",
                "guest:guest",
                "-X",
                method,
            ])
            .args(["-H", "content-type: application/json", "-d", body, &url])
            .output()
            .await
            .expect("curl is installed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{method} {url}: {text} {}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// Publishes a message as the management UI's form does.
    pub async fn publish_by_form(&self, exchange: &str, form: &str) {
        let answer = self.manage("POST", &format!("exchanges/{}/{exchange}/publish", self.name), form).await;
        assert!(answer.contains("\"routed\":true"), "{answer}");
    }

    /// Deletes a queue of the virtual host and its messages.
    pub async fn delete_queue(&self, queue: &str) {
        self.manage("DELETE", &format!("queues/{}/{queue}", self.name), "").await;
    }

    /// Purges every queue of the virtual host.
    pub async fn purge_all(&self) {
        for queue in self.queues().await {
            let name = queue["name"].as_str().expect("a name");
            if queue["exclusive"] != Value::Bool(true) {
                self.manage("DELETE", &format!("queues/{}/{name}/contents", self.name), "").await;
            }
        }
    }

    /// Returns the queues of the virtual host, from the management API.
    pub async fn queues(&self) -> Vec<Value> {
        serde_json::from_str(&self.manage("GET", &format!("queues/{}", self.name), "").await).expect("a list")
    }

    /// Returns a queue, from the management API of a node.
    pub async fn queue_at(&self, node: usize, queue: &str) -> Value {
        let text = self.manage_at(node, "GET", &format!("queues/{}/{queue}", self.name), "").await;
        serde_json::from_str(&text).expect("an object")
    }

    /// Sets a policy for the virtual host's queues whose names match.
    pub async fn policy(&self, pattern: &str, definition: &str) {
        let body = format!(r#"{{"pattern": "{pattern}", "definition": {definition}, "apply-to": "queues"}}"#);
        self.manage("PUT", &format!("policies/{}/test", self.name), &body).await;
    }

    /// Waits until a task queue has this many consumers: a worker is ready before it consumes.
    pub async fn consumed_by(&self, queue: &str, workers: u64) {
        eventually("all workers consume", Duration::from_secs(20), async || {
            let queues = self.queues().await;
            let queue = queues.iter().find(|known| known["name"] == queue).map(|queue| queue["consumers"].clone());
            if queue.as_ref().and_then(Value::as_u64) == Some(workers) { Ok(()) } else { Err(queue) }
        })
        .await;
    }

    /// Connects a plain AMQP client.
    pub async fn amqp(&self) -> Amqp {
        Amqp::connect(&self.broker_urls()[0]).await
    }
}

impl Output {
    /// Returns itself if the exit code is 0.
    ///
    /// # Panics
    /// On any other exit code.
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Returns itself if the exit code is `code`.
    ///
    /// # Panics
    /// On any other exit code.
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Its standard output as JSON.
    ///
    /// # Panics
    /// If it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.folder.disable_cleanup(std::thread::panicking());
    }
}

/// Runs a command until it exits.
pub async fn output(mut command: Command) -> Output {
    command.kill_on_drop(true);
    let running = tokio::time::timeout(COMMAND_LIMIT, command.output());
    let output = running.await.expect("the command ends in time").expect("the program is built");
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
