//! What operators and workers see of a running job, and where there is none.

use tonic::codegen::tokio_stream as stream;
use tonic::transport::Channel;
use unisono_tests::cluster::{Cluster, SHORT, same_result, undisturbed};
use unisono_tests::{free_port, run, start, wait_until};

/// Health by tonic-health, and the services' descriptions by tonic-reflection.
#[test]
fn health_and_reflection_are_served() {
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), SHORT);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let channel = Channel::from_shared(format!("http://{}", cluster.address)).expect("a URL");
    let channel = runtime.block_on(channel.connect()).expect("the coordinator answers");
    runtime.block_on(async {
        for service in ["", "unisono.v1.Coordinator"] {
            let request = HealthCheckRequest { service: service.into() };
            let health = HealthClient::new(channel.clone()).check(request).await.expect("an answer").into_inner();
            assert_eq!(health.status(), ServingStatus::Serving, "{service}");
        }
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let call = ServerReflectionClient::new(channel).server_reflection_info(stream::iter([request])).await;
        let answer = call.expect("an answer").into_inner().message().await.expect("a message").expect("one");
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("no list") };
        let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
        assert!(names.contains(&"unisono.v1.Coordinator") && names.contains(&"unisono.v1.Operator"), "{names:?}");
    });
}

/// Something that takes connections and never says a word.
#[test]
fn silence_instead_of_a_coordinator_is_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let mute = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", mute.local_addr().expect("an address"));
    for args in [&["worker", "--patience", "1"][..], &["status"]] {
        let out = run(dir.path(), &[args, &["--coordinator", &url]].concat());
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && error.contains("does not answer: is it a coordinator"), "{error}");
    }
}

#[test]
fn a_worker_without_a_coordinator_gives_up_with_a_clear_message() {
    let dir = tempfile::tempdir().expect("a folder");
    let url = format!("http://127.0.0.1:{}", free_port());
    let out = run(dir.path(), &["worker", "--coordinator", &url, "--patience", "1"]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    let words = ["unisono: cannot reach a coordinator at", &url, "tried for 1 s"];
    assert!(words.iter().all(|w| error.contains(w)) && !error.contains("panicked"), "{error}");
}

#[test]
fn status_drain_and_stop_reach_a_running_job() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), SHORT);
    let status = cluster.ask(&["status"]);
    let text = String::from_utf8_lossy(&status.stdout).to_string();
    assert!(status.status.success() && text.contains("digits-mlp: step ") && text.contains("of 6000"), "{text}");
    assert_eq!(text.lines().count(), 3, "one worker under two lines of heading:\n{text}");
    let drain = cluster.ask(&["drain", "999"]);
    let error = String::from_utf8_lossy(&drain.stderr);
    assert_eq!(drain.status.code(), Some(1), "{error}");
    assert!(error.contains("there is no worker 999") && error.contains("status"), "{error}");
    assert!(cluster.ask(&["stop"]).status.success());
    let summary = cluster.end();
    assert_eq!(summary["status"], "stopped");
    let checkpoint = dir.path().join(summary["checkpoint"].as_str().expect("a checkpoint"));
    let eval = unisono_tests::summary(&run(dir.path(), &["eval", checkpoint.to_str().expect("UTF-8"), "--json"]));
    assert_eq!(eval["weights_digest"], summary["weights_digest"]);

    let gone = run(dir.path(), &["status", "--coordinator", &format!("127.0.0.1:{}", free_port())]);
    let error = String::from_utf8_lossy(&gone.stderr);
    assert_eq!(gone.status.code(), Some(1), "{error}");
    assert!(error.contains("cannot reach a coordinator at"), "{error}");
}

#[test]
fn workers_that_are_drained_by_id_or_name_leave_and_the_others_go_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), 3 * SHORT);
    let join =
        |name| start(dir.path(), &["worker", "--coordinator", &cluster.address, "--patience", "5", "--name", name]);
    // Ids are small numbers, and a name may be a number too.
    let others = [join("twin"), join("twin"), join("4711")];
    wait_until("the others", || String::from_utf8_lossy(&cluster.ask(&["status"]).stdout).lines().count() == 6);
    for (name, words) in [("nobody", "there is no worker nobody"), ("twin", "several workers are named twin")] {
        let refused = cluster.ask(&["drain", name]);
        let error = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(1) && error.contains(words), "{error}");
    }
    for worker in ["1", "4711"] {
        assert!(cluster.ask(&["drain", worker]).status.success(), "{worker}");
    }
    let summary = cluster.end();
    for worker in others {
        assert!(worker.wait_with_output().expect("it ends").status.success());
    }
    same_result(&summary, &undisturbed(3 * SHORT));
    assert_eq!(summary["workers_joined"], 4);
}
