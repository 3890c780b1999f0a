//! Files of processes: captured on submission, listed, fetched, and removed when nothing needs them.

use std::path::{Path, PathBuf};

use baton_common::config;
use baton_common::digest::Digest;
use baton_common::objects::{Entry, Manifest, Objects};
use baton_common::store::blob::Outcome;
use baton_tests::scene::{Output, Scene};
use serde_json::{Value, json};

/// A scene with a document, files next to it, and a folder for objects that does not exist yet.
struct Desk {
    scene: Scene,
}

impl Desk {
    async fn new(files: &[(&str, &str)]) -> Self {
        let scene = Scene::new().await;
        // The first connection creates the schema; the test then checks that nothing was stored.
        scene.baton(&["list"]).await.ok();
        std::fs::create_dir(scene.path("desk")).unwrap();
        for (name, content) in files {
            let path = scene.path("desk").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        Self { scene }
    }

    fn objects_folder(&self) -> PathBuf {
        self.scene.path("objects")
    }

    fn n_objects(&self) -> usize {
        files_below(&self.objects_folder().join("sha256"))
    }

    fn objects(&self) -> Objects {
        let url = Some(self.objects_folder().display().to_string());
        Objects::open(&config::Objects { url, ..config::Objects::default() }).unwrap()
    }

    /// Runs a command in a folder other than the document's.
    async fn baton(&self, arguments: &[&str]) -> Output {
        let folder = self.objects_folder().display().to_string();
        self.scene.baton_in(self.scene.folder(), &[("BATON_OBJECTS_URL", &folder)], arguments).await
    }

    fn document(&self, text: &str) -> String {
        let path = self.scene.path("desk/job.yaml");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    async fn submit(&self, text: &str) -> String {
        let document = self.document(text);
        self.baton(&["submit", &document, "-o", "ids"]).await.ok().stdout.trim().to_owned()
    }

    /// Ends a process as a worker does after it ran at a site and left these files.
    async fn end(&self, pid: &str, files: &[(&str, &str)]) {
        let objects = self.objects();
        let mut entries = Vec::new();
        for (path, content) in files {
            let digest = objects.put_bytes(content.as_bytes().to_vec()).await.unwrap();
            entries.push(Entry { path: (*path).into(), digest, size: content.len() as u64, executable: false });
        }
        let results = objects.put_manifest(&Manifest::new(entries).unwrap()).await.unwrap();
        let outcome = Outcome { exit: Some(0), ok: true, results: Some(results), ..Outcome::default() };
        let hex: String = outcome.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let sql = format!(
            "UPDATE process SET outcome = '\\x{hex}', place = 3, state = 4, ended_at = 1 WHERE id = '{pid}' RETURNING 1"
        );
        assert_eq!(self.scene.sql(&sql).await.trim(), "1");
    }
}

fn files_below(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.map(|entry| entry.unwrap().path()).map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

const JOB: &str = "run: [x]\nat: cluster\nhold: true\n";

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_submitted_depends_on_the_client_no_more() {
    let desk = Desk::new(&[("a.txt", "a"), ("data/b.txt", "b"), ("data/same.txt", "a"), ("c.tgz", "c")]).await;
    let text = format!("{JOB}in: [client://a.txt, client://data/, {{from: client://c.tgz, how: unpack}}]");
    let pid = desk.submit(&text).await;
    std::fs::remove_dir_all(desk.scene.path("desk")).unwrap();

    let on_site = &desk.scene.show(&pid).await["spec"]["on_site"];
    let archive = Digest::of(b"c").to_string();
    assert_eq!(on_site["inputs"].as_array().unwrap().len(), 1, "{on_site}");
    assert_eq!(on_site["inputs"][0]["from"], json!({"scope": "store", "path": archive}));
    let objects = desk.objects();
    let manifest = objects.get_manifest(on_site["staged"].as_str().unwrap().parse().unwrap()).await.unwrap();
    let mut files = Vec::new();
    for entry in manifest.entries() {
        files.push((entry.path.as_str().unwrap(), objects.get_bytes(entry.digest, entry.size).await.unwrap()));
    }
    assert_eq!(files, [("a.txt", b"a".to_vec()), ("data/b.txt", b"b".to_vec()), ("data/same.txt", b"a".to_vec())]);
    // Three contents and the manifest.
    assert_eq!(desk.n_objects(), 4);
    // A second, identical submission stores nothing more.
    let desk_again = desk.scene.path("desk");
    std::fs::create_dir_all(desk_again.join("data")).unwrap();
    for (name, content) in [("a.txt", "a"), ("data/b.txt", "b"), ("data/same.txt", "a"), ("c.tgz", "c")] {
        std::fs::write(desk_again.join(name), content).unwrap();
    }
    let again = desk.submit(&text).await;
    assert_eq!(desk.scene.show(&again).await["spec"], desk.scene.show(&pid).await["spec"]);
    assert_eq!(desk.n_objects(), 4);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_is_missing_is_told_at_once_before_anything_is_stored() {
    let desk = Desk::new(&[("there", "x")]).await;
    let document = desk.document(&format!("{JOB}in: [client://one, client://there, client://two]"));
    let output = desk.baton(&["submit", &document]).await.exits(2);
    for name in ["desk/one does not exist", "desk/two does not exist"] {
        assert!(output.stderr.contains(name), "{output:?}");
    }
    assert!(!desk.objects_folder().exists());
    assert_eq!(desk.scene.count("true").await, 0);

    // A site that is missing in a configuration with sites.
    let sites = "[sites.clutter]\ntransport = 'local'\nlauncher = 'fork'\nroot = '/x'\n[sites.farm]\n\
                 transport = 'local'\nlauncher = 'fork'\nroot = '/x'\n";
    let config = desk.scene.spec("sites.toml", sites).display().to_string();
    let document = desk.document(&format!("{JOB}in: [client://there]"));
    let output = desk.baton(&["--config", &config, "submit", &document]).await.exits(2);
    assert!(output.stderr.contains("unknown site `cluster`") && output.stderr.contains("`clutter`"), "{output:?}");
    let document = desk.document("run: [x]\nat: zzz\nhold: true");
    let output = desk.baton(&["--config", &config, "submit", &document]).await.exits(2);
    assert!(output.stderr.contains("configured sites: clutter, farm"), "{output:?}");
    assert_eq!(desk.scene.count("true").await, 0);
    let document = desk.document("run: [x]\nat: farm\nhold: true");
    desk.baton(&["--config", &config, "submit", &document]).await.ok();
    assert_eq!(desk.scene.count("true").await, 1);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_dry_run_shows_the_tree_and_stores_nothing() {
    let desk = Desk::new(&[("a.txt", "abc"), ("data/b.txt", "b"), ("data/deep/same.txt", "abc")]).await;
    let text = format!(
        "{JOB}session: s\nneeds: {{nodes: 2, mem: 3GiB, time: 1h}}\n\
         in: [client://a.txt, client://data/, {{from: resource://pseudo/Si.upf, how: link}}]\n\
         out: [a.out, {{from: '*.chk', to: session://chk/, how: move, when: always}}]\nvalues: result.json"
    );
    let document = desk.document(&text);
    let output = desk.baton(&["submit", "--dry-run", &document]).await.ok().stdout;
    let expected = "\
x at cluster, queue default
  run      x
  needs    2 nodes, 3.00 GiB mem, 1h time
task://
  Si.upf  a link to resource://pseudo/Si.upf
  a.txt  3 B, to be sent
  data/
    b.txt  1 B, to be sent
    deep/
      same.txt  3 B, already stored
kept afterwards
  a.out  to store://
  *.chk  to session://chk/, moved, in any case
  result.json  read as the values
3 local files, 7 B; 2 of them to be sent, 4 B

Job script: unknown, because the configuration does not have the site
";
    assert_eq!(output, expected);
    assert!(!desk.objects_folder().exists());
    assert_eq!(desk.scene.count("true").await, 0);

    desk.submit(&text).await;
    let n_files = desk.n_objects();
    std::fs::write(desk.scene.path("desk/a.txt"), "other").unwrap();
    let plan = desk.baton(&["submit", "--dry-run", &document, "-o", "json"]).await.ok().json();
    assert_eq!(plan["staging"]["sent"], json!({"files": 1, "bytes": 5}));
    let sent: Vec<(&str, &Value)> = plan["staging"]["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| (file["to"].as_str().unwrap(), &file["sent"]))
        .collect();
    let (yes, no) = (json!(true), json!(false));
    assert_eq!(sent, [("task://a.txt", &yes), ("task://data/b.txt", &no), ("task://data/deep/same.txt", &no)]);
    assert_eq!(desk.n_objects(), n_files);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn results_are_listed_and_fetched_once() {
    let desk = Desk::new(&[]).await;
    let pid = desk.submit(JOB).await;
    let early = desk.baton(&["results", &pid]).await.exits(5);
    assert!(early.stderr.contains("has no results yet"), "{early:?}");
    desk.end(&pid, &[("a.out", "result"), ("logs/b.log", "log"), ("a.out.part", "p")]).await;

    let list = desk.baton(&["results", &pid, "-o", "json"]).await.ok().json();
    let paths: Vec<&str> = list.as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["a.out", "a.out.part", "logs/b.log"]);
    assert_eq!(
        (&list[0]["size"], list[0]["digest"].as_str().unwrap()),
        (&json!(6), &*Digest::of(b"result").to_string())
    );
    let url = list[0]["url"].as_str().unwrap().strip_prefix("file://").unwrap();
    assert_eq!(std::fs::read_to_string(url).unwrap(), "result");
    let table = desk.baton(&["results", &pid]).await.ok().stdout;
    assert!(table.contains("logs/b.log") && table.contains("3 B"), "{table}");
    assert_eq!(desk.scene.show(&pid).await["results"].as_str().map(str::len), Some(64));

    let to = desk.scene.path("fetched").display().to_string();
    let got = desk.baton(&["results", &pid, "--get", &to, "-o", "json"]).await.ok().json();
    assert_eq!((&got["fetched"], &got["there"]), (&json!(3), &json!(0)));
    std::fs::write(desk.scene.path("fetched/a.out"), "RESULT").unwrap();
    let got = desk.baton(&["results", &pid, "--get", &to, "-o", "json"]).await.ok().json();
    assert_eq!((&got["fetched"], &got["there"]), (&json!(1), &json!(2)));
    assert_eq!(std::fs::read_to_string(desk.scene.path("fetched/a.out")).unwrap(), "result");
    assert_eq!(files_below(&desk.scene.path("fetched")), 3);

    // A damaged object is not accepted.
    std::fs::write(url, "RESULT").unwrap();
    let other = desk.scene.path("other").display().to_string();
    let damaged = desk.baton(&["results", &pid, "--get", &other]).await.exits(1);
    assert!(damaged.stderr.contains("is damaged"), "{damaged:?}");
    assert!(!desk.scene.path("other/a.out").exists());
    std::fs::remove_file(url).unwrap();
    desk.baton(&["results", &pid, "--get", &other]).await.exits(3);
    let none = desk.submit(JOB).await;
    let sql = format!("UPDATE process SET place = 3, state = 4, outcome = '\\x0180' WHERE id = '{none}' RETURNING 1");
    desk.scene.sql(&sql).await;
    desk.baton(&["results", &none]).await.exits(3);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_no_process_needs_is_removed_and_nothing_else() {
    let desk = Desk::new(&[("a", "a"), ("b", "b"), ("c", "c")]).await;
    assert_eq!(desk.baton(&["gc", "-o", "json"]).await.ok().json()["removed"]["objects"], 0);
    assert!(!desk.objects_folder().exists());
    let kept = desk.submit(&format!("{JOB}in: [client://a, {{from: client://b, how: unpack}}]")).await;
    let pruned = desk.submit(&format!("{JOB}in: [client://a, client://c]")).await;
    desk.end(&kept, &[("out", "kept")]).await;
    desk.end(&pruned, &[("out", "pruned"), ("same", "kept")]).await;
    let objects = desk.objects();
    let stray = objects.put_bytes(b"stray".to_vec()).await.unwrap();
    // a, b, c, two manifests of inputs, two of results, kept, pruned, stray.
    assert_eq!(desk.n_objects(), 10);

    let young = desk.baton(&["gc", "-o", "json"]).await.ok().json();
    assert_eq!((&young["removed"]["objects"], &young["young"]["objects"]), (&json!(0), &json!(10)));
    let dry = desk.baton(&["gc", "--older-than", "1ms", "--dry-run", "-o", "json"]).await.ok().json();
    assert_eq!((&dry["removed"]["objects"], &dry["needed"]["objects"]), (&json!(1), &json!(9)));
    assert!(objects.has(stray).await.unwrap());
    assert_eq!(desk.baton(&["gc", "--older-than", "1ms", "-o", "json"]).await.ok().json()["removed"]["bytes"], 5);
    assert!(!objects.has(stray).await.unwrap());

    desk.scene.sql(&format!("DELETE FROM process WHERE id = '{pruned}' RETURNING 1")).await;
    desk.scene.sql(&format!("DELETE FROM spec WHERE id = '{pruned}' RETURNING 1")).await;
    let gone = desk.baton(&["gc", "--older-than", "1ms"]).await.ok().stdout;
    assert!(gone.starts_with("removed: 4 objects"), "{gone}");
    assert_eq!(desk.n_objects(), 5);
    let to = desk.scene.path("fetched").display().to_string();
    desk.baton(&["results", &kept, "--get", &to]).await.ok();
    for content in ["a", "b", "kept"] {
        assert!(objects.has(Digest::of(content.as_bytes())).await.unwrap(), "{content}");
    }

    // If the needs of a process are unknown, nothing is removed.
    objects.put_bytes(b"stray".to_vec()).await.unwrap();
    desk.scene.sql("UPDATE spec SET body = '\\xff80' RETURNING 1").await;
    let refused = desk.baton(&["gc", "--older-than", "1ms"]).await.exits(4);
    assert!(refused.stderr.contains("newer"), "{refused:?}");
    assert!(objects.has(stray).await.unwrap());
}

/// Two databases share an object store by mistake, such as those of a test and of production.
#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_another_database_may_need_is_not_removed() {
    let desk = Desk::new(&[("a", "a"), ("b", "b")]).await;
    let other = Scene::new().await;
    let folder = desk.objects_folder().display().to_string();
    let by_other = async |arguments: &[&str]| {
        other.baton_in(desk.scene.folder(), &[("BATON_OBJECTS_URL", &folder)], arguments).await
    };
    let refuses = async |gc: Output, reason: &str| {
        assert!(gc.code == 4 && gc.stderr.contains(reason), "{gc:?}");
    };
    desk.submit(&format!("{JOB}in: [client://a]")).await;
    let stray = desk.objects().put_bytes(b"stray".to_vec()).await.unwrap();
    let gc = ["gc", "--older-than", "1ms"];
    let dry = ["gc", "--older-than", "1ms", "--dry-run"];
    for command in [&gc[..], &dry[..]] {
        refuses(by_other(command).await, "another database").await;
    }
    // Older programs leave no mark.
    std::fs::remove_dir_all(desk.objects_folder().join("owners")).unwrap();
    for command in [&gc[..], &dry[..]] {
        refuses(by_other(command).await, "this database needs no object").await;
    }
    // a, its manifest, and the stray.
    assert_eq!(desk.n_objects(), 3);
    let removed = desk.baton(&[&gc[..], &["-o", "json"]].concat()).await.ok().json();
    assert_eq!((&removed["removed"]["objects"], desk.n_objects()), (&json!(1), 2), "{removed}");
    assert!(!desk.objects().has(stray).await.unwrap());
    refuses(by_other(&gc).await, "another database").await;

    // The first owner does not know what the other database needs, either.
    let document = desk.document(&format!("{JOB}in: [client://b]"));
    by_other(&["submit", &document]).await.ok();
    let refused = desk.baton(&gc).await;
    let mark = refused.stderr.trim().rsplit("file://").next().map(PathBuf::from).unwrap();
    refuses(refused, "another database").await;
    assert_eq!(desk.n_objects(), 4);
    std::fs::remove_file(mark).unwrap();
    desk.baton(&gc).await.ok();
    assert_eq!(desk.n_objects(), 2);
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn what_another_database_may_need_in_a_bucket_is_not_removed() {
    let desk = Desk::new(&[("a", "a")]).await;
    let other = Scene::new().await;
    let server = std::env::var("BATON_TEST_S3").expect("BATON_TEST_S3 is not set; run tests/run");
    let place = format!("{}/some/prefix", desk.scene.folder().file_name().unwrap().to_string_lossy().to_lowercase());
    let bucket = format!("{server}/{}", place.split('/').next().unwrap());
    let made = tokio::process::Command::new("curl").args(["-sSf", "-X", "PUT", &bucket]).status().await;
    assert!(made.unwrap().success());
    let url = format!("s3://{place}");
    let keys = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")];
    let variables = [("BATON_OBJECTS_URL", url.as_str()), ("AWS_ENDPOINT_URL", &server), keys[0], keys[1]];
    let baton = async |scene: &Scene, arguments: &[&str]| scene.baton_in(scene.folder(), &variables, arguments).await;
    let gc = ["gc", "--older-than", "1ms"];
    let document = desk.document(&format!("{JOB}in: [client://a]"));
    for _ in 0..2 {
        baton(&desk.scene, &["submit", &document]).await.ok();
    }
    let refused = baton(&other, &gc).await.exits(4);
    assert!(refused.stderr.contains(&format!("remove {url}/owners/")), "{refused:?}");
    let kept = baton(&desk.scene, &gc).await.ok();
    assert!(kept.stdout.contains("needed by processes: 2 objects"), "{kept:?}");
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn a_place_for_objects_that_cannot_be_used_is_named_with_the_remedy() {
    let desk = Desk::new(&[("a", "a")]).await;
    let document = desk.document(&format!("{JOB}in: [client://a]"));
    let server = std::env::var("BATON_TEST_S3").expect("BATON_TEST_S3 is not set; run tests/run");
    let keys = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "s3cret")];
    let run = async |variables: &[(&str, &str)]| {
        let output = desk.scene.baton_in(desk.scene.folder(), variables, &["submit", &document]).await;
        assert!(!output.stderr.contains("s3cret"), "{output:?}");
        output
    };
    let of_server = [("BATON_OBJECTS_URL", "s3://not-made/x"), ("AWS_ENDPOINT_URL", server.as_str())];
    let output = run(&[of_server, keys].concat()).await.exits(2);
    assert!(output.stderr.contains("bucket `not-made` does not exist; create it"), "{output:?}");
    let output = run(&of_server).await.exits(2);
    assert!(output.stderr.contains("AWS_ACCESS_KEY_ID"), "{output:?}");
    let nobody = [("BATON_OBJECTS_URL", "s3://b"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:9")];
    let output = run(&[nobody, keys].concat()).await.exits(7);
    assert!(output.stderr.contains("Connection refused"), "{output:?}");
    let plain = [("BATON_OBJECTS_URL", "s3://b"), ("AWS_ENDPOINT_URL", "http://192.0.2.1:9")];
    let output = run(&[plain, keys].concat()).await.exits(2);
    assert!(output.stderr.contains("is not encrypted"), "{output:?}");
    let file = desk.scene.spec("file", "").display().to_string();
    let output = run(&[("BATON_OBJECTS_URL", &format!("{file}/below"))]).await.exits(1);
    assert!(output.stderr.contains("cannot use the object store in folder"), "{output:?}");
    assert_eq!(desk.scene.count("true").await, 0);
}
