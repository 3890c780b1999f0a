//! One test's part of the services.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::amqp::Amqp;
use crate::eventually;
use crate::process::{Worker, clean_environment};
use crate::services::{Services, folder, programs};

/// How long a command of the CLI may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// A virtual host, a schema and a folder, gone with this unless the test fails.
pub struct Scene {
    services: Services,
    name: String,
    folder: tempfile::TempDir,
}

/// What a command of the CLI said.
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
    /// A scene on the shared services.
    pub async fn new() -> Self {
        Self::on(Services::shared()).await
    }

    /// A scene on services of its own, which it may break.
    pub async fn private() -> Self {
        let services = tokio::task::spawn_blocking(Services::private).await.expect("no panic");
        Self::on(services).await
    }

    /// A scene on services of its own, whose database has a disk of so many megabytes.
    pub async fn on_small_disk(megabytes: u32) -> Self {
        let services = tokio::task::spawn_blocking(move || Services::on_small_disk(megabytes)).await.expect("no panic");
        Self::on(services).await
    }

    /// A scene on services of its own, with a broker of three nodes.
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

    /// Makes the virtual host; needed again after the broker was restarted empty.
    pub async fn make_vhost(&self) {
        self.manage("PUT", &format!("vhosts/{}", self.name), "").await;
        let rights = r#"{"configure": ".*", "write": ".*", "read": ".*"}"#;
        self.manage("PUT", &format!("permissions/{}/guest", self.name), rights).await;
    }

    /// The services below.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// The virtual host's URL, with a short heartbeat; of a cluster that of every node.
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

    /// A folder of the test's own.
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

    /// Starts a worker that is another program, and waits until it is ready.
    pub async fn worker_of(&self, program: &str, name: &str, arguments: &[&str]) -> Worker {
        let worker = Worker::start(self, &programs().join(program), &[], name, arguments);
        worker.ready().await;
        worker
    }

    /// Starts a worker that is another program, and need not become ready.
    pub fn start_of(&self, program: &str, name: &str, arguments: &[&str]) -> Worker {
        Worker::start(self, &programs().join(program), &[], name, arguments)
    }

    /// Starts a worker with more variables, which need not let it become ready.
    pub fn worker_with(&self, variables: &[(&str, &str)], name: &str, arguments: &[&str]) -> Worker {
        Worker::start(self, &programs().join("baton-worker"), variables, name, arguments)
    }

    /// Runs a command of the CLI.
    pub async fn baton(&self, arguments: &[&str]) -> Output {
        self.baton_in(self.folder(), &[], arguments).await
    }

    /// Runs a command of the CLI in a folder, with more variables.
    pub async fn baton_in(&self, folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        output(self.command_in(folder, variables, arguments)).await
    }

    /// Runs a command of a CLI that is another program.
    pub async fn baton_of(&self, program: &Path, arguments: &[&str]) -> Output {
        output(self.command_of(program, self.folder(), &[], arguments)).await
    }

    /// A command of the CLI that is not started yet.
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

    /// Submits a spec and gives back the pids.
    pub async fn submit(&self, text: &str, count: u32) -> Vec<String> {
        let spec = self.spec(&format!("{}.yaml", uuid::Uuid::now_v7().simple()), text);
        let count = count.to_string();
        let output = self.baton(&["submit", &spec.display().to_string(), "--count", &count, "-o", "ids"]).await.ok();
        output.stdout.lines().map(str::to_owned).collect()
    }

    /// Everything about a process.
    pub async fn show(&self, pid: &str) -> Value {
        self.baton(&["show", pid, "-o", "json"]).await.ok().json()[0].clone()
    }

    /// How many processes are in each state; asked of the database itself, which is quicker than a command.
    pub async fn count(&self, condition: &str) -> u64 {
        let text = self.sql(&format!("SELECT count(*) FROM process WHERE {condition}")).await;
        text.trim().parse().expect("a count")
    }

    /// Runs SQL in the schema; rows are lines, columns separated by `|`.
    pub async fn sql(&self, sql: &str) -> String {
        self.psql(&self.database_url(), sql).await
    }

    async fn psql(&self, url: &str, sql: &str) -> String {
        let output = Command::new("psql").args([url, "-qtAc", sql]).output().await.expect("psql is installed");
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Asks the management API.
    pub async fn manage(&self, method: &str, path: &str, body: &str) -> String {
        self.manage_at(1, method, path, body).await
    }

    /// Asks the management API of a node, from 1.
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

    /// Deletes a queue of the virtual host with what is in it.
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

    /// The queues of the virtual host, as the management API sees them.
    pub async fn queues(&self) -> Vec<Value> {
        serde_json::from_str(&self.manage("GET", &format!("queues/{}", self.name), "").await).expect("a list")
    }

    /// A queue as the management API of a node sees it.
    pub async fn queue_at(&self, node: usize, queue: &str) -> Value {
        let text = self.manage_at(node, "GET", &format!("queues/{}/{queue}", self.name), "").await;
        serde_json::from_str(&text).expect("an object")
    }

    /// Sets a policy for the virtual host's queues whose names match.
    pub async fn policy(&self, pattern: &str, definition: &str) {
        let body = format!(r#"{{"pattern": "{pattern}", "definition": {definition}, "apply-to": "queues"}}"#);
        self.manage("PUT", &format!("policies/{}/test", self.name), &body).await;
    }

    /// Waits until a task queue has as many consumers: a worker is ready before it consumes.
    pub async fn consumed_by(&self, queue: &str, workers: u64) {
        eventually("all workers consume", Duration::from_secs(20), async || {
            let queues = self.queues().await;
            let queue = queues.iter().find(|known| known["name"] == queue).map(|queue| queue["consumers"].clone());
            if queue.as_ref().and_then(Value::as_u64) == Some(workers) { Ok(()) } else { Err(queue) }
        })
        .await;
    }

    /// A plain AMQP client.
    pub async fn amqp(&self) -> Amqp {
        Amqp::connect(&self.broker_urls()[0]).await
    }
}

impl Output {
    /// The same, if the exit code is 0.
    ///
    /// # Panics
    /// If it is not.
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// The same, if the exit code is this.
    ///
    /// # Panics
    /// If it is not.
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Its standard output as JSON.
    ///
    /// # Panics
    /// If it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.folder.disable_cleanup(std::thread::panicking());
    }
}

/// Runs a command to its end.
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
