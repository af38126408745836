# An upload to inbox/ → Pub/Sub → `scail events --subscription …` → the inbox is looked at at once. It is looked at every
# minute in any case, so a message that is lost costs a minute; one that cannot be delivered is kept for a look at why.

data "google_storage_project_service_account" "storage" {
}

data "google_project" "this" {
}

locals {
  # Pub/Sub itself, which moves a message to the dead letters.
  pubsub_agent = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_topic" "uploads" {
  name                       = "${var.name}-uploads"
  message_retention_duration = "86400s"
}

resource "google_pubsub_topic_iam_member" "storage_publishes" {
  topic  = google_pubsub_topic.uploads.name
  role   = "roles/pubsub.publisher"
  member = "serviceAccount:${data.google_storage_project_service_account.storage.email_address}"
}

resource "google_storage_notification" "uploads" {
  bucket             = google_storage_bucket.inputs.name
  topic              = google_pubsub_topic.uploads.id
  payload_format     = "JSON_API_V1"
  event_types        = ["OBJECT_FINALIZE"]
  object_name_prefix = "inbox/"

  depends_on = [google_pubsub_topic_iam_member.storage_publishes]
}

resource "google_pubsub_subscription" "uploads" {
  name                       = "${var.name}-uploads"
  topic                      = google_pubsub_topic.uploads.id
  ack_deadline_seconds       = 30
  message_retention_duration = "86400s"

  expiration_policy {
    ttl = ""
  }

  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead_letters.id
    max_delivery_attempts = 10
  }

  depends_on = [google_pubsub_topic_iam_member.dead_letters_arrive]
}

resource "google_pubsub_topic" "dead_letters" {
  name = "${var.name}-uploads-dead"
}

# Without a subscription of its own a dead letter would be dropped.
resource "google_pubsub_subscription" "dead_letters" {
  name                       = "${var.name}-uploads-dead"
  topic                      = google_pubsub_topic.dead_letters.id
  message_retention_duration = "604800s"

  expiration_policy {
    ttl = ""
  }
}

resource "google_pubsub_topic_iam_member" "dead_letters_arrive" {
  topic  = google_pubsub_topic.dead_letters.name
  role   = "roles/pubsub.publisher"
  member = local.pubsub_agent
}

resource "google_pubsub_subscription_iam_member" "dead_letters_leave" {
  subscription = google_pubsub_subscription.uploads.name
  role         = "roles/pubsub.subscriber"
  member       = local.pubsub_agent
}
