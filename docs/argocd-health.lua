-- Health of a FineTuneJob for Argo CD, which by itself takes every resource of a kind that it does not know for healthy.
-- It goes by the phase and by the condition Stalled, as Flux and Helm do.
local health = {status = "Progressing", message = ""}
local status = obj.status
if status == nil or status.phase == nil or status.observedGeneration ~= obj.metadata.generation then
  health.message = "the operator has not looked at it yet"
  return health
end
health.message = status.phase
if status.progress ~= nil and status.progress.summary ~= nil then
  health.message = status.phase .. ", step " .. status.progress.summary
end
if status.phase == "Succeeded" then
  health.status = "Healthy"
elseif status.phase == "Failed" then
  health.status = "Degraded"
elseif status.phase == "Suspended" then
  health.status = "Suspended"
end
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == "Stalled" and condition.status == "True" then
    health.status = "Degraded"
    health.message = condition.reason .. ": " .. condition.message
  end
end
return health
