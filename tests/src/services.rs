//! RabbitMQ and PostgreSQL: the shared ones, and private ones that a test may break.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The addresses of the services.
pub struct Services {
    /// AMQP URLs without a virtual host, `amqp://guest:guest@127.0.0.1:PORT`, one for each node of a cluster.
    pub amqp: Vec<String>,
    /// The management API of each node: `http://127.0.0.1:PORT`.
    pub management: Vec<String>,
    /// `postgres://…/baton`.
    pub database: String,
    private: Option<tempfile::TempDir>,
    /// The broker's script: `rabbitmq`, or `cluster`.
    broker: &'static str,
}

impl Services {
    /// Returns the services that `tests/run` has started. Tests must not break them.
    ///
    /// # Panics
    /// If there are none.
    pub fn shared() -> Self {
        let name = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run tests/run"));
        Self {
            amqp: vec![name("BATON_TEST_AMQP")],
            management: vec![name("BATON_TEST_MANAGEMENT")],
            database: name("BATON_TEST_DATABASE"),
            private: None,
            broker: "rabbitmq",
        }
    }

    /// Starts private services, which are stopped on drop.
    pub fn private() -> Self {
        Self::begin("rabbitmq", &[])
    }

    /// Starts private services whose database is on a disk of this size.
    pub fn on_small_disk(megabytes: u32) -> Self {
        Self::begin("rabbitmq", &["disk", &megabytes.to_string()])
    }

    /// Starts private services with a broker of three nodes, 1 to 3.
    pub fn cluster() -> Self {
        Self::begin("cluster", &[])
    }

    fn begin(broker: &'static str, disk: &[&str]) -> Self {
        let private = Some(folder("baton-services-"));
        let mut services = Self { amqp: Vec::new(), management: Vec::new(), database: String::new(), private, broker };
        services.broker("start");
        if !disk.is_empty() {
            services.script("postgres", disk);
        }
        services.postgres("start");
        for (name, value) in services.variables() {
            match name.as_str() {
                "BATON_TEST_AMQP" => services.amqp = value.split(',').map(str::to_owned).collect(),
                "BATON_TEST_MANAGEMENT" => services.management = value.split(',').map(str::to_owned).collect(),
                "BATON_TEST_DATABASE" => services.database = value,
                other => panic!("unknown variable {other}"),
            }
        }
        services
    }

    fn variables(&self) -> Vec<(String, String)> {
        let text = self.script(self.broker, &["env"]) + &self.script("postgres", &["env"]);
        text.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect()
    }

    /// Kills RabbitMQ with SIGKILL.
    pub fn kill_broker(&self) {
        self.broker("kill");
    }

    /// Starts RabbitMQ again with its stored data.
    pub fn start_broker(&self) {
        self.broker("start");
    }

    /// Kills RabbitMQ and starts it without its stored data, including virtual hosts.
    pub fn restart_broker_empty(&self) {
        self.broker("restart-empty");
    }

    /// Runs `rabbitmqctl` on this broker.
    pub fn control_broker(&self, arguments: &[&str]) {
        self.script("rabbitmq", &[&["ctl"], arguments].concat());
    }

    /// Copies the data of the database, which is stopped for that.
    pub fn save_database(&self) {
        self.postgres("save");
    }

    /// Kills the database and starts it with the copy.
    pub fn restore_database(&self) {
        self.postgres("restore");
    }

    /// Fills the small disk of the database, and returns the path of the file that fills it.
    pub fn fill_disk(&self) -> PathBuf {
        let folder = self.private.as_ref().expect("only private services can be broken").path();
        let filler = folder.join("postgres/disk/filler");
        let file = std::fs::File::create(&filler).expect("the disk exists");
        let zeros = vec![0; 1 << 20];
        for len in [1 << 20, 1 << 12] {
            while std::io::Write::write_all(&mut &file, &zeros[..len]).is_ok() {}
        }
        filler
    }

    /// Kills PostgreSQL with SIGKILL.
    pub fn kill_database(&self) {
        self.postgres("kill");
    }

    /// Starts PostgreSQL again.
    pub fn start_database(&self) {
        self.postgres("start");
    }

    /// Stops PostgreSQL cleanly and starts it.
    pub fn restart_database(&self) {
        self.postgres("restart");
    }

    /// Kills a node of the cluster with SIGKILL.
    pub fn kill_node(&self, node: usize) {
        self.script_in("rabbitmq", &format!("cluster/{node}"), &["kill"]);
    }

    /// Starts a node of the cluster again with its stored data.
    pub fn start_node(&self, node: usize) {
        self.script_in("rabbitmq", &format!("cluster/{node}"), &["start"]);
    }

    /// Isolates a node from the others; clients still reach it.
    pub fn split_node(&self, node: usize) {
        self.script("cluster", &["split", &node.to_string()]);
    }

    fn broker(&self, verb: &str) {
        self.script(self.broker, &[verb]);
    }

    fn postgres(&self, verb: &str) {
        self.script("postgres", &[verb]);
    }

    /// Runs a service's script on the private instance.
    fn script(&self, service: &str, arguments: &[&str]) -> String {
        self.script_in(service, service, arguments)
    }

    fn script_in(&self, service: &str, instance: &str, arguments: &[&str]) -> String {
        let folder = self.private.as_ref().expect("only private services can be broken").path().join(instance);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("services/{service}.sh"));
        let mut command = Command::new(script);
        command.arg(arguments[0]).arg(&folder).args(&arguments[1..]);
        let output = command.output().expect("the script exists");
        assert!(
            output.status.success(),
            "{service} {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        if self.private.is_some() && !std::thread::panicking() {
            self.broker("kill");
            self.postgres("end");
        } else if let Some(folder) = &self.private {
            // The scripts' own checks must not hide a test failure.
            for (service, verb) in [(self.broker, "kill"), ("postgres", "end")] {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("services/{service}.sh"));
                let _ = Command::new(script).arg(verb).arg(folder.path().join(service)).status();
            }
        }
    }
}

/// Creates a folder that is removed on drop. It is in the folder of the run, if there is one: `tests/run` stops what a
/// killed test has left running there.
pub(crate) fn folder(prefix: &str) -> tempfile::TempDir {
    let parent = std::env::var_os("BATON_TEST_RUN").map_or_else(std::env::temp_dir, PathBuf::from);
    let mut folder = tempfile::Builder::new();
    // PostgreSQL runs as a user other than root and must be able to enter it.
    folder.prefix(prefix).permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
    folder.tempdir_in(parent).expect("a folder can be made")
}

/// The folder with the programs of the next version, which `tests/run` builds.
///
/// # Panics
/// If there is none.
pub fn programs_of_next_version() -> PathBuf {
    PathBuf::from(std::env::var_os("BATON_TEST_NEXT_DIR").expect("BATON_TEST_NEXT_DIR is not set; run tests/run"))
}

/// The folder of the programs under test.
pub fn programs() -> PathBuf {
    match std::env::var_os("BATON_TEST_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let test = std::env::current_exe().expect("a test has a path");
            test.parent().and_then(Path::parent).expect("target/debug/deps").to_owned()
        }
    }
}
