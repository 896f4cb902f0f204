{{/* What rules of admissionPolicy look at. */}}
{{- define "finetune-operator.jobVariables" -}}
- name: sources
  expression: >-
    [object.spec.model.uri, object.spec.dataset.train.uri]
    + (has(object.spec.dataset.validation) ? [object.spec.dataset.validation.uri] : [])
    + (has(object.spec.validation) && has(object.spec.validation.forgetting) ? [object.spec.validation.forgetting.dataset.uri] : [])
    + (has(object.spec.checkpoint) && has(object.spec.checkpoint.resumeFrom) ? [object.spec.checkpoint.resumeFrom.uri] : [])
- name: destinations
  expression: "has(object.spec.output) && has(object.spec.output.uri) ? [object.spec.output.uri] : []"
# Whoever resolves `..` leaves the folder that a prefix names.
- name: climbs
  expression: >-
    (variables.sources + variables.destinations).exists(uri,
    uri.split('/').exists(part, part.lowerAscii().replace('%2e', '.') == '..'))
- name: limits
  expression: "has(object.spec.resources) && has(object.spec.resources.limits) ? object.spec.resources.limits : {}"
- name: requests
  expression: "has(object.spec.resources) && has(object.spec.resources.requests) ? object.spec.resources.requests : {}"
# Extended resources have a domain that is not Kubernetes' own; those that a profile calls other devices are none here. A quantity
# may be a number or 1k.
- name: accelerators
  expression: >-
    double(has(object.spec.nodes) ? object.spec.nodes : 1) * [
    variables.limits.map(name, name.contains('/') && !name.matches('^(requests[.].*|(.*[.])?kubernetes[.]io)/') && !name.matches({{ .otherDevices | squote }}), quantity(string(variables.limits[name])).asApproximateFloat()).sum(),
    variables.requests.map(name, name.contains('/') && !name.matches('^(requests[.].*|(.*[.])?kubernetes[.]io)/') && !name.matches({{ .otherDevices | squote }}), quantity(string(variables.requests[name])).asApproximateFloat()).sum()].max()
- name: storage
  expression: "has(object.spec.checkpoint) && has(object.spec.checkpoint.storage) ? [object.spec.checkpoint.storage] : []"
- name: claims
  expression: >-
    (variables.sources + variables.destinations).filter(uri, uri.startsWith('pvc://')).map(uri, uri.split('/')[2])
    + variables.storage.filter(storage, has(storage.claim)).map(storage, storage.claim)
- name: profile
  expression: "has(object.spec.profile) ? object.spec.profile : 'default'"
- name: queues
  expression: >-
    has(object.spec.scheduling) && has(object.spec.scheduling.queueName) ? [object.spec.scheduling.queueName] : []
{{- end }}

{{/* The validations of one set of rules; empty if there is no rule in it. */}}
{{- define "finetune-operator.jobRules" -}}
{{- if not (kindIs "invalid" .maxAcceleratorsPerJob) }}
- expression: variables.accelerators <= {{ int .maxAcceleratorsPerJob }}.0
  messageExpression: "'spec.resources: ' + string(variables.accelerators) + ' accelerators over all nodes, at most {{ int .maxAcceleratorsPerJob }} are allowed here'"
  reason: Forbidden
{{- end }}
{{- $destinations := .allowedDestinationPrefixes }}
{{- if kindIs "invalid" $destinations }}
{{- $destinations = .allowedSourcePrefixes }}
{{- end }}
{{- range $field, $prefixes := dict "source" .allowedSourcePrefixes "destination" $destinations }}
{{- if not (kindIs "invalid" $prefixes) }}
- expression: {{ printf "variables.%ss.all(uri, %s.exists(prefix, uri.startsWith(prefix)))" $field (include "finetune-operator.strings" $prefixes) | quote }}
  message: {{ printf "a %s of this job is not allowed here; allowed are those that start with %s" $field (include "finetune-operator.listed" $prefixes) | quote }}
  reason: Forbidden
{{- end }}
{{- end }}
{{- if not (and (kindIs "invalid" .allowedSourcePrefixes) (kindIs "invalid" $destinations) (kindIs "invalid" .allowedClaims)) }}
- expression: "!variables.climbs"
  message: a source or destination of this job has a part '..', which leads out of what is allowed here
  reason: Forbidden
{{- end }}
{{- if not (kindIs "invalid" .allowedClaims) }}
- expression: {{ printf "variables.claims.all(claim, claim in %s)" (include "finetune-operator.strings" .allowedClaims) | quote }}
  message: {{ printf "this job names a claim that is not allowed here; allowed are %s" (include "finetune-operator.listed" .allowedClaims) | quote }}
  reason: Forbidden
{{- end }}
{{- with .maxStorageSize }}
- expression: {{ printf "variables.storage.all(storage, !has(storage.size) || quantity(storage.size).compareTo(quantity('%v')) <= 0)" . | quote }}
  message: {{ printf "spec.checkpoint.storage.size: at most %v is allowed here" . | quote }}
  reason: Forbidden
{{- end }}
{{- if not (kindIs "invalid" .allowedStorageClasses) }}
- expression: {{ printf "variables.storage.all(storage, !has(storage.storageClassName) || storage.storageClassName in %s)" (include "finetune-operator.strings" .allowedStorageClasses) | quote }}
  message: {{ printf "spec.checkpoint.storage.storageClassName: allowed here are %s" (include "finetune-operator.listed" .allowedStorageClasses) | quote }}
  reason: Forbidden
{{- end }}
{{- if not (kindIs "invalid" .allowedProfiles) }}
- expression: {{ printf "variables.profile in %s" (include "finetune-operator.strings" .allowedProfiles) | quote }}
  message: {{ printf "spec.profile: allowed here are %s" (include "finetune-operator.listed" .allowedProfiles) | quote }}
  reason: Forbidden
{{- end }}
{{- if not (kindIs "invalid" .allowedQueues) }}
- expression: {{ printf "variables.queues.all(queue, queue in %s)" (include "finetune-operator.strings" .allowedQueues) | quote }}
  message: {{ printf "spec.scheduling.queueName: allowed here are %s" (include "finetune-operator.listed" .allowedQueues) | quote }}
  reason: Forbidden
{{- end }}
{{- end }}

{{/*
The validation by which a profile is named in the namespaces that it says only; empty if no profile says any. The operator
refuses the rest as well, later: these are the same words, crds::profile::Profile::serves.
*/}}
{{- define "finetune-operator.profileRule" -}}
{{- $namespaces := list }}
{{- range $name, $profile := .Values.profiles }}
{{- $allowed := index (default dict (get (default dict $profile) "allowed")) "namespaces" }}
{{- if not (and (kindIs "invalid" $allowed) (eq $name "default")) }}
{{- $patterns := list }}
{{- range $allowed }}{{- $patterns = append $patterns (regexQuoteMeta . | replace "\\*" ".*") }}{{- end }}
{{- $namespaces = append $namespaces (printf "%s: %s" (toRawJson $name) (printf "^(%s)$" (join "|" $patterns) | toRawJson)) }}
{{- end }}
{{- end }}
{{- with $namespaces }}
{{- $map := printf "{%s}" (join ", " .) }}
- expression: {{ printf "!(variables.profile in %s) || request.namespace.matches(%s[variables.profile])" $map $map | quote }}
  messageExpression: "'spec.profile: jobs of this namespace may not name ' + variables.profile"
  reason: Forbidden
{{- end }}
{{- end }}

{{/* A list of strings in CEL. An empty one has no type of its own, which is no matter to a membership. */}}
{{- define "finetune-operator.strings" -}}
{{- $quoted := list }}
{{- range . }}{{- $quoted = append $quoted (toRawJson .) }}{{- end }}
{{- printf "[%s]" (join ", " $quoted) }}
{{- end }}

{{- define "finetune-operator.listed" -}}
{{- if . }}{{ join ", " . }}{{ else }}none{{ end }}
{{- end }}

{{/* Whether a Job or pod bears the marks by which the operator knows a child; takes the variable's name. */}}
{{- define "finetune-operator.isChild" -}}
(has({{ . }}.metadata.labels) && 'finetune.dev/job-uid' in {{ . }}.metadata.labels)
{{- printf " || " }}
{{- "" }}(has({{ . }}.metadata.ownerReferences) && {{ . }}.metadata.ownerReferences.exists(owner, owner.kind == 'FineTuneJob' && owner.apiVersion.startsWith('finetune.dev/')))
{{- end }}
