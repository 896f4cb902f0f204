{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 48 characters leave room for the longest suffix of an object. */}}
{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" }}
{{- else }}
{{- $name := include "finetune-operator.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 48 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 48 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: finetune-operator
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.create is false: name the account to use in serviceAccount.name" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* registry/repository@digest, or registry/repository:tag; takes a list of image, default registry, default tag. */}}
{{- define "finetune-operator.image" -}}
{{- $image := index . 0 }}
{{- $registry := default (index . 1) $image.registry }}
{{- $name := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne $registry "") }}
{{- if $image.digest }}
{{- printf "%s@%s" $name $image.digest }}
{{- else }}
{{- printf "%s:%s" $name (default (index . 2) $image.tag) }}
{{- end }}
{{- end }}

{{/* Stands in for profiles.default. It is not in values.yaml: Helm would merge it into the administrator's own. */}}
{{- define "finetune-operator.defaultProfile" -}}
resources: {limits: {nvidia.com/gpu: "1"}}
cpuResources: {requests: {cpu: "1", memory: 2Gi}}
maxResources: {nvidia.com/gpu: "8"}
tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
storage: {size: 50Gi}
{{- end }}

{{/* The profiles as the operator reads them: those without an image get the trainer's. */}}
{{- define "finetune-operator.profiles" -}}
{{- $image := include "finetune-operator.image" (list .Values.trainer.image .Values.image.registry .Chart.AppVersion) }}
{{- $profiles := merge dict .Values.profiles }}
{{- if not (hasKey $profiles "default") }}
{{- $_ := set $profiles "default" (include "finetune-operator.defaultProfile" . | fromYaml) }}
{{- end }}
{{- range $name, $profile := $profiles }}
{{- $profile = deepCopy (default dict $profile) }}
{{- include "finetune-operator.checkVariables" (list $name $profile "environment" $profile.environment) }}
{{- include "finetune-operator.checkVariables" (list $name $profile "cpuPods.environment" (default dict $profile.cpuPods).environment) }}
{{- if not $profile.image }}
{{- $_ := set $profile "image" $image }}
{{- end }}
{{- if and $.Values.clusterAssignsUser (not (hasKey $profile "clusterAssignsUser")) }}
{{- $_ := set $profile "clusterAssignsUser" true }}
{{- end }}
{{ $name | quote }}:
  {{- toYaml $profile | nindent 2 }}
{{- end }}
{{- end }}

{{/* What no schema can say, and would end the operator: takes a list of a profile's name, the profile, a field and its variables. */}}
{{- define "finetune-operator.checkVariables" -}}
{{- $name := index . 0 }}
{{- $profile := index . 1 }}
{{- $field := index . 2 }}
{{- $seen := list }}
{{- range index . 3 }}
{{- if and $profile.caBundle (eq .name "SSL_CERT_FILE") }}
{{- fail (printf "profiles.%s.%s: found SSL_CERT_FILE, which caBundle sets" $name $field) }}
{{- end }}
{{- if has .name $seen }}
{{- fail (printf "profiles.%s.%s: found %s twice, expected each name once" $name $field .name) }}
{{- end }}
{{- $seen = append $seen .name }}
{{- end }}
{{- end }}

{{/* What the operator may do in the namespaces that it serves. */}}
{{- define "finetune-operator.rules" -}}
- {apiGroups: [finetune.dev], resources: [finetunejobs], verbs: [list, watch, delete]}
- {apiGroups: [finetune.dev], resources: [finetunejobs/status], verbs: [patch]}
# Owner references with blockOwnerDeletion need it where the API server checks them, as OpenShift's does.
- {apiGroups: [finetune.dev], resources: [finetunejobs/finalizers], verbs: [update]}
- {apiGroups: [batch], resources: [jobs], verbs: [get, list, watch, create, delete]}
- {apiGroups: [""], resources: [pods], verbs: [list, watch]}
- {apiGroups: [""], resources: [configmaps, persistentvolumeclaims], verbs: [get, create]}
- {apiGroups: [events.k8s.io], resources: [events], verbs: [create, patch]}
# Why a volume does not mount, or a quota refuses a pod, is told in events of the kubelet and the Job controller alone.
- {apiGroups: [""], resources: [events], verbs: [list]}
- {apiGroups: [kueue.x-k8s.io], resources: [workloads], verbs: [list, watch]}
{{- end }}
