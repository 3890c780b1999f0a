//! The commands of the README's walk do what it says.

use std::path::Path;

use baton_tests::process::clean_environment;
use baton_tests::scene::{Scene, output};
use baton_tests::services::programs;
use tokio::process::Command;

fn readme() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("README.md");
    std::fs::read_to_string(path).unwrap()
}

/// The code blocks in this language.
fn blocks(language: &str) -> Vec<String> {
    let text = readme();
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

#[tokio::test]
#[ignore = "needs services: run tests/run"]
async fn the_walk_runs_as_it_stands() {
    let walk = blocks("sh").into_iter().find(|block| block.contains("baton-worker --name")).expect("the walk");
    let scene = Scene::new().await;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new("bash");
    clean_environment(&mut command);
    let path = format!("{}:{}", programs().display(), std::env::var("PATH").unwrap());
    command
        .args(["-euo", "pipefail", "-c", &walk])
        .current_dir(scene.folder())
        .env("PATH", path)
        .env("HOME", scene.folder())
        .env("USER", "tester")
        .env("BATON_BROKER_URL", scene.broker_url())
        .env("BATON_DATABASE_URL", scene.database_url());
    std::os::unix::fs::symlink(root.join("examples"), scene.path("examples")).unwrap();
    let output = output(command).await.ok();
    assert!(output.stdout.contains("finished [0]"), "{output:?}");
    assert_eq!(scene.count("state = 4").await, scene.count("true").await);
}

#[test]
fn its_two_commands_are_the_ones_that_work() {
    let text = readme();
    assert!(text.contains("cargo run --bin baton -- run examples/hello.yaml"));
    assert!(text.contains("tests/run"));
}
