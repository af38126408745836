# Who may do what. Nobody has a key: pods act as these accounts through workload identity, machines by being them.

resource "google_service_account" "coordinator" {
  account_id   = "${var.name}-coordinator"
  display_name = "SCAIL: plans runs, watches the inbox"
}

resource "google_service_account" "worker" {
  account_id   = "${var.name}-worker"
  display_name = "SCAIL: renders clips"
}

# The coordinator moves manifests out of the inbox, and reads references and poses to hash them.
resource "google_storage_bucket_iam_member" "coordinator_inputs" {
  bucket = google_storage_bucket.inputs.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.coordinator.member
}

resource "google_storage_bucket_iam_member" "coordinator_inbox" {
  bucket = google_storage_bucket.inputs.name
  role   = "roles/storage.objectUser"
  member = google_service_account.coordinator.member

  condition {
    title = "inbox"
    expression = join(" || ", [
      for folder in ["inbox", "done", "refused", "claims"] :
      "resource.name.startsWith(\"projects/_/buckets/${google_storage_bucket.inputs.name}/objects/${folder}/\")"
    ])
  }
}

resource "google_storage_bucket_iam_member" "coordinator_renders" {
  bucket = google_storage_bucket.renders.name
  role   = "roles/storage.objectUser"
  member = google_service_account.coordinator.member
}

resource "google_storage_bucket_iam_member" "coordinator_checkpoints" {
  bucket = google_storage_bucket.checkpoints.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.coordinator.member
}

resource "google_pubsub_subscription_iam_member" "coordinator_hears" {
  subscription = google_pubsub_subscription.uploads.name
  role         = "roles/pubsub.subscriber"
  member       = google_service_account.coordinator.member
}

# A worker reads inputs and weights, and writes clips; it has nothing to do with the inbox.
resource "google_storage_bucket_iam_member" "worker_inputs" {
  bucket = google_storage_bucket.inputs.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_renders" {
  bucket = google_storage_bucket.renders.name
  role   = "roles/storage.objectUser"
  member = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_checkpoints" {
  bucket = google_storage_bucket.checkpoints.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.worker.member
}

resource "google_service_account_iam_member" "pods" {
  for_each = var.kubernetes_namespace == "" ? {} : {
    coordinator = google_service_account.coordinator.name
    worker      = google_service_account.worker.name
  }

  service_account_id = each.value
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${var.project}.svc.id.goog[${var.kubernetes_namespace}/${each.key}]"
}

# Producers add inputs and look at clips. They cannot delete what a run is reading, nor touch weights.
resource "google_storage_bucket_iam_member" "producers_upload" {
  for_each = toset(var.producers)

  bucket = google_storage_bucket.inputs.name
  role   = "roles/storage.objectCreator"
  member = each.value
}

resource "google_storage_bucket_iam_member" "producers_see" {
  for_each = {
    for pair in setproduct(var.producers, [google_storage_bucket.inputs.name, google_storage_bucket.renders.name]) :
    "${pair[0]} ${pair[1]}" => { who = pair[0], bucket = pair[1] }
  }

  bucket = each.value.bucket
  role   = "roles/storage.objectViewer"
  member = each.value.who
}
